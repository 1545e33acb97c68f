"""``NextItemRecommender``: the module that ``moesaic fit`` trains on histories of clicks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

import core
from apps.base.checks import check_at_least
from apps.nets.blocks import one_ffn
from apps.nets.loss import OutputLogits
from apps.nets.packing import Packing
from apps.nets.place import Place, check_fits, check_layers
from apps.recsys.metrics import CUTOFF, RankingMetrics
from apps.recsys.sequence import scoring
from apps.recsys.sequence.model import HistoryModel, HistoryModelConfig, best_items, check_ids, last_of
from apps.recsys.sequence.report import NextItemReport, NextItemReportConfig
from apps.recsys.sequence.semantic_ids import SemanticIdsConfig
from apps.train.publish.model_card import ModelKind
from apps.train.step.module import SparseModule, TaskOutput
from core.config.plain import from_plain
from core.convert.read.calls import evaluating

_REPORT = NextItemReportConfig()


class NextItems(NamedTuple):
    """Predictions of a batch.

    Attributes:
        index: int64 (B,), the history's place in its dataset.
        user: int64 (B,), the user's place among the data's ``user_names``.
        user_name: the user's name in the data, or the place where the data have no names.
        item: the k best next items of each history as they are in the file, best first, or their ids where the data
            have no values; fewer where fewer are candidates.
        name: the items' names; None if the data have no names for the items.
        score: the items' logits.
    """

    index: Tensor  # type: ignore[assignment]  # a batch has no use for tuple.index
    user: Tensor
    user_name: list[str]
    item: list[list[str]]
    name: list[list[str]] | None
    score: list[list[float]]


class NextItemRecommender(SparseModule):
    """A history transformer, sparse or dense, that ranks all items as the next one.

    It is trained by the softmax cross-entropy over all items at every position of a history, and evaluated by the rank
    of the target among all items, none sampled: ``hr_10``, ``ndcg_10`` and ``mrr``.

    Configs may also be given as mappings, as they are in a run's ``config.yaml``.

    Args:
        num_items: number of items, which count from 1; the command line takes it from the data.
        max_length: items of the longest history; the command line takes it from the data.
        sequence: the transformer.
        moe: the MoE layer that replaces the FFN of some blocks; None: dense FFNs. Its router must be causal.
        moe_blocks: which blocks: "all", "everyN", "lastN" (the last N of every second block), or indices.
        dense_ffn: the FFN of those blocks in a dense model, as in the baselines; None: the same as in the others.
        exclude_seen: whether validation, test and prediction leave out the items that the user had before: all of them
            where the batch names them (``seen_BH``), else those in the history. For data whose users take an item
            once; a target that the user had before then ranks last.
        top_k: number of items that a prediction names.
        report: options of the report that a test writes besides the metrics; None: nothing.
        kwargs: ``optimizer``, ``ema_decay``, ``average_last``, ``grow`` and ``distil`` of ``SparseModule``.
        mask_seen_items: whether the softmax of the loss leaves out the items that the history has before, at each
            position, as ``exclude_seen`` does in evaluation. For data whose users take an item once: the model need
            not learn which items were seen. It needs ``exclude_seen``. A target that the history has before stays a
            candidate.
        semantic_ids: items are short sequences of codes, and a decoder generates those of the next item, as TIGER does
            (arXiv 2305.05065): see ``CodeDecoder``. Metrics and predictions know the items that its beam search finds.
            None: each item has a vector, and its logit.

    Raises:
        ValueError: a value is out of its range, or the parts do not fit together.
    """

    reporter = NextItemReport
    model_kind = ModelKind(
        "a recommender of the next item of a history",
        'model.predict([["first item", "second item"]])',
        tags=("recommendation",),
    )
    data_arguments: ClassVar[tuple[str, ...]] = ("num_items", "max_length")
    compiled_networks = ("model.blocks",)
    monitor: str = f"val/ndcg_{CUTOFF}"
    monitor_mode: ClassVar[Literal["min", "max"]] = "max"
    shown_metrics = (f"hr_{CUTOFF}", "mrr")

    @classmethod
    def defaults_of_none(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().defaults_of_none(arguments), "sequence": HistoryModelConfig()}

    def __init__(
        self,
        num_items: int | None = None,
        max_length: int = 200,
        sequence: HistoryModelConfig | None = None,
        moe: core.MoEConfig | None = None,
        moe_blocks: str | list[int] = "all",
        dense_ffn: core.DenseFFN | None = None,
        exclude_seen: bool = False,
        top_k: int = 10,
        report: NextItemReportConfig | None = _REPORT,
        mask_seen_items: bool = False,
        semantic_ids: SemanticIdsConfig | None = None,
        **kwargs: Any,
    ) -> None:
        sequence = from_plain(sequence, HistoryModelConfig, "sequence")
        moe, dense_ffn = from_plain(moe, core.MoEConfig, "moe"), from_plain(dense_ffn, core.DenseFFN, "dense_ffn")
        semantic_ids = from_plain(semantic_ids, SemanticIdsConfig, "semantic_ids")
        super().__init__(**kwargs)
        if num_items is None:
            return self.wait_for_data("num_items")
        check_at_least(1, top_k=top_k)
        if semantic_ids is not None and mask_seen_items:
            raise ValueError("mask_seen_items=True does not go with semantic_ids, whose softmax is over codes")
        if semantic_ids is not None and top_k > semantic_ids.beam_size:
            raise ValueError(f"top_k={top_k} exceeds semantic_ids.beam_size={semantic_ids.beam_size}")
        if mask_seen_items and not exclude_seen:
            raise ValueError("mask_seen_items=True needs exclude_seen=True: it leaves scores of seen items untrained")
        self.report = from_plain(report, NextItemReportConfig, "report")
        self.sequence, self.moe, self.moe_blocks = sequence or HistoryModelConfig(), moe, moe_blocks
        self.num_items, self.max_length, self.semantic_ids = num_items, max_length, semantic_ids
        self.exclude_seen, self.top_k, self.mask_seen_items = exclude_seen, top_k, mask_seen_items
        # A token of the decoder is a code, and no item.
        known = ("token_ids_BS",) if semantic_ids is None else ()
        self.place = Place(type(self).__name__, known, is_causal=True)
        if moe is not None:
            check_fits(self.place, moe.router, moe.balance)
        self.model = HistoryModel(
            self.sequence,
            num_items=num_items,
            max_length=max_length,
            ffn=one_ffn(moe, dense_ffn),
            moe_blocks=moe_blocks,
            semantic_ids=semantic_ids,
        )
        check_layers(self.place, self.model)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.semantic_ids is not None and self.starts_afresh:
            codes = self.semantic_ids.codes_of(self._data())
            self.model.set_codes(self.trainer.strategy.broadcast(codes))

    def forward(self, items: Tensor, seconds: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        """Map item ids (B, S), 0 for padding, to scores (B, num_items + 1) of the next item; see ``HistoryModel``."""
        return self.model(items, seconds, seen)

    def task_loss(self, batch: Any) -> TaskOutput:
        """Return the mean cross-entropy of the targets, over the positions that have one; padding has none.

        In evaluation ``outputs`` are the scores after each history's last item and ``targets`` the item that followed
        it; histories without such an item are left out.
        """
        h_TD, packing, index_T = self.model.encode(*self.example_inputs(batch))
        target_T = batch.targets_BS.flatten()[index_T]
        check_ids(batch.targets_BS, self.num_items, "target", "none")
        has_T = target_T > 0
        rows = _rows(has_T)
        seen = _seen_columns(batch.items_BS, packing, index_T)[rows] if self.mask_seen_items else None
        loss = self.model.loss(h_TD[rows], target_T[rows], seen)
        if self.training:
            predicted = None if self.semantic_ids is not None else OutputLogits(h_TD[rows], self.model.output_weight)
            return TaskOutput(loss, None, None, len(batch.items_BS), distribution=predicted)
        kept_B = packing.last_B >= 0
        last_target_B = target_T.new_zeros(packing.num_rows)
        last_target_B[kept_B] = target_T[packing.last_B[kept_B]]
        kept_B = last_target_B > 0
        left_out = self._left_out(batch)
        scores_BI = self.model.scores(last_of(h_TD, packing)[kept_B], None if left_out is None else left_out[kept_B])
        return TaskOutput(loss, scores_BI, last_target_B[kept_B], len(batch.items_BS))

    def distribution(self, batch: Any) -> OutputLogits:
        """Return the logits of all items at the positions that have a target.

        Raises:
            ValueError: with ``mask_seen_items`` those of seen items mean nothing, and with ``semantic_ids`` there are
                none.
        """
        if self.semantic_ids is not None:
            raise ValueError("a model with semantic_ids has no logits of all items to distil")
        if self.mask_seen_items:
            raise ValueError(
                "mask_seen_items=True leaves logits of seen items untrained: distil with mask_seen_items=False"
            )
        h_TD, _, index_T = self.model.encode(*self.example_inputs(batch))
        return OutputLogits(h_TD[_rows(batch.targets_BS.flatten()[index_T] > 0)], self.model.output_weight)

    def _left_out(self, batch: Any) -> Tensor | None:
        """Return the items of each history that may not be recommended, int64 (B, H); None: there are none."""
        seen_BH: Tensor | None = getattr(batch, "seen_BH", None)
        return None if not self.exclude_seen else batch.items_BS if seen_BH is None else seen_BH

    def example_inputs(self, batch: Any) -> tuple[Tensor, ...]:
        """Return the items of the histories, and their times where the model reads them.

        Raises:
            ValueError: it does, and the data have none.
        """
        if not self.sequence.time_buckets:
            return (batch.items_BS,)
        seconds_BS = getattr(batch, "seconds_BS", None)
        if seconds_BS is None:
            raise ValueError(
                f"sequence.time_buckets={self.sequence.time_buckets} needs the times of the items, and the data have "
                "none: give data.time_column, or time_buckets=0"
            )
        return batch.items_BS, seconds_BS

    def cost_unit(self, batch: Any) -> str:
        items = int((batch.items_BS > 0).sum()) / len(batch.items_BS)
        return f"a history of {items:.4g} items on average"

    def build_metrics(self) -> RankingMetrics:
        return RankingMetrics(ks=(CUTOFF,))

    def predict_step(self, batch: Any, batch_idx: int) -> NextItems:
        """Return the ``top_k`` best next items of each history."""
        items_BS, *seconds = self.example_inputs(batch)
        scores_BI = self(items_BS, seconds[0] if seconds else None, self._left_out(batch))
        id_B, score_B = best_items(scores_BI, self.top_k)
        items, names, users = (
            getattr(self._data(), attribute, None) for attribute in ("item_values", "item_names", "user_names")
        )
        item_B = [[str(i) if items is None else items[i] for i in row] for row in id_B]
        name_B = None
        if names is not None and names != items:
            name_B = [[names[i] for i in row] for row in id_B]
        user_name_B = [str(u) if users is None else users[u] for u in batch.user_B.tolist()]
        return NextItems(batch.index_B, batch.user_B, user_name_B, item_B, name_B, score_B)

    @torch.inference_mode()
    def predict(self, histories: Any, top: int = 10, include_seen: bool = False, batch_size: int = 256) -> Any:
        """Return the best next items of each history with their scores, by the items' own values.

        Items are those that the checkpoint keeps; no training file is needed. Interactions with others are left out,
        and a warning counts them; a history of no others gets no items.

        Args:
            histories: lists of items, the oldest first: one for each history; a model with ``time_buckets`` takes the
                items of a list as of one time. Or events, one per row, with the columns that the training file had
                (user, item and time, if there was one): a pandas DataFrame, a pyarrow Table, a dict of columns, or a
                path of CSV or Parquet files. Events that the training left out for their rating (``min_rating``) are
                left out.
            top: maximum number of items per history.
            include_seen: recommend items of the history too, as ``moesaic predict`` does unless the model has
                ``exclude_seen``.
            batch_size: histories a step.

        Returns:
            For lists a list for each history: pairs of item and score, the best first. For events a row for each
            recommendation, the best first, of users in the order in which they first occur: the columns of user and
            item, ``name`` if the items have names next to their values, and ``score``, the logit. They are a DataFrame
            for a DataFrame, a ``pyarrow.Table`` for a table, and a dict of numpy arrays for a dict and files. Items are
            integers where those given are and all of the model's are written as such ("7", not "007").

        Raises:
            ValueError: a column is missing, a user or an item has no value, a time is neither a number nor a date, or
                the model has neither a checkpoint's encoding nor its data.

        Example::

            model = apps.load("runs/clicks")
            model.predict([["tea", "rye"], ["fig"]], top=2)     # [[("oat", 1.3), ("fig", 0.2)], [...]]
        """
        with evaluating(self):
            return scoring.predict(self, histories, top, include_seen, batch_size)

    def widened(self, checkpoint: Mapping[str, Any], encoding_state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a checkpoint with the embeddings of this model's further items, as the model has initialized them."""
        codes = checkpoint["state_dict"].get("model.item_embed.codes")
        if codes is not None and len(codes) <= self.num_items:
            raise ValueError(f"semantic ids of {len(codes) - 1} items are trained, and the data have {self.num_items}")
        key = "model.item_embed.weight"
        old = None if codes is not None else checkpoint["state_dict"].get(key)
        if old is None or len(old) >= len(self.model.item_embed.weight):
            return checkpoint
        added = self.model.item_embed.weight.detach()[len(old) :].to(old.dtype)
        state = {**checkpoint["state_dict"], key: torch.cat((old, added))}
        return {**checkpoint, "state_dict": state, "encoding": encoding_state}


def _seen_columns(items_BS: Tensor, packing: Packing, index_T: Tensor) -> Tensor:
    """Return int64 (T, L), the columns of the output of each position's items so far, and -1 after them."""
    items_BL = packing.pad(items_BS.flatten()[index_T][:, None]).squeeze(-1)
    later_TL = torch.arange(packing.length, device=items_BL.device) > packing.position_T[:, None]
    return (items_BL - 1)[packing.slot_T // packing.length].masked_fill_(later_TL, -1)


def _rows(has_T: Tensor) -> Tensor | slice:
    """Return an index of the marked rows; where all are, a slice, which copies nothing."""
    return slice(None) if bool(has_T.all()) else has_T
