"""``HubCausalLM``: a causal language model of transformers, sparse or dense, trained whole or by adapters."""

from __future__ import annotations

import functools
import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import core
from apps.hub.adapter_files import save_adapters
from apps.hub.data import IGNORED, HubBatch
from apps.hub.folders import load_model, load_tokenizer, save_model, teller
from apps.hub.packing import keeps_apart
from apps.hub.transformers_internals import masks_of_documents
from apps.train.checkpoint.checkpoints import BestAndLast
from apps.train.cost.flops import cuda_devices
from apps.train.cost.quantizing import quantize_model
from apps.train.publish.model_card import ModelKind
from apps.train.step.module import SparseModule, TaskOutput
from apps.train.step.pieces import Block, PieceMetrics, token_metrics
from core.adopted import is_sparse
from core.config.plain import from_plain
from core.convert.read.calls import evaluating
from core.fields import Checked, Count, CountOrZero, NotNegative, Positive, PositiveShare
from core.parallel import needs_all_ranks

_logger = logging.getLogger(__name__)


@core.register_config
@dataclass(frozen=True)
class LoRAConfig(Checked):
    """Adapters that are trained, instead of the weights.

    Attributes:
        rank: of each update.
        alpha: factor on an update, scaled by ``1 / rank``; None: ``rank``.
        modules: "experts", "router", "attention", or patterns of the names of linear layers, such as ``*.q_proj``.

    Raises:
        ValueError: a value out of its range.
    """

    rank: Count = 16
    alpha: Positive | None = 32.0
    modules: tuple[str, ...] = ("experts", "attention")


@core.register_config
@dataclass(frozen=True)
class GenerateConfig(Checked):
    """How a prompt is continued; the folder's ``generation_config.json`` may add more, such as ``repetition_penalty``.

    Attributes:
        max_new_tokens: tokens at most.
        temperature: divisor of the logits; 0: the best token each time.
        top_p: draw from the fewest most probable tokens whose probabilities sum to p at least.
        seed: of the random numbers.

    Raises:
        ValueError: a value out of its range.
    """

    max_new_tokens: Count = 256
    temperature: NotNegative = 0.0
    top_p: PositiveShare = 1.0
    seed: CountOrZero = 0


class RowMetrics(PieceMetrics[Block]):
    """Mean loss of a token, perplexity and token accuracy, each row once on any number of processes."""

    has_loss = True

    def values_of(self, pieces: Sequence[Block]) -> dict[str, float]:
        """Return the metrics by name."""
        loss = math.fsum(row.nll for row in pieces) / max(sum(row.tokens for row in pieces), 1)
        return {"loss": loss, **token_metrics(pieces)}


class HubCausalLM(SparseModule):
    """A causal language model in a local folder of transformers' layout, whose MoE blocks are adopted.

    Args:
        folder: local folder of the model; the command line takes it from the data.
        lora: adapters that are trained; None: the weights are.
        quantize: how frozen experts are kept under ``lora``, such as "int8" or "int4:64" (QLoRA); None: as they are.
        freeze: parts that do not train: "router", "experts", or patterns of parameters' names.
        balance: weights of the balance losses; None: the model's own ``router_aux_loss_coef``, and 0 without one.
            transformers' own balance loss is never added.
        gradient_checkpointing: compute activations again in the backward instead of keeping them.
        dtype: of the weights; None: as the folder has them. Trained without ``lora`` they should be float32: half
            precision rounds small steps away.
        generate: how a prediction continues a prompt.
        kwargs: ``optimizer``, ``ema_decay`` and ``average_last`` of ``SparseModule``.

    Raises:
        ValueError: a folder that cannot be read, a value out of its range, ``quantize`` without ``lora``, or a name in
            ``freeze`` or ``lora.modules`` that the model does not have.
    """

    model_kind = ModelKind("a language model", 'model.predict(["the beginning"])', "text-generation")
    data_arguments: ClassVar[tuple[str, ...]] = ("folder",)
    compiled_networks = ("model",)
    monitor: str = "val/loss"
    monitor_mode: ClassVar[Literal["min", "max"]] = "min"
    readout = ("model.lm_head",)
    shown_metrics = ("perplexity", "token_accuracy")

    def __init__(
        self,
        folder: str | None = None,
        lora: LoRAConfig | None = None,
        quantize: str | None = None,
        freeze: Sequence[str] = (),
        balance: core.Balance | None = None,
        gradient_checkpointing: bool = False,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        generate: GenerateConfig = GenerateConfig(),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if folder is None:
            return self.wait_for_data("folder")
        folder = str(Path(folder).expanduser().absolute())
        self.keep_arguments({"folder": folder})
        self.quantize, self.freeze, self.dtype_of_weights = quantize, tuple(freeze), dtype
        self.folder, self.lora = folder, from_plain(lora, LoRAConfig, "lora")
        self.generate = from_plain(generate, GenerateConfig, "generate")
        if quantize is not None and self.lora is None:
            raise ValueError(f"quantize={quantize!r} without lora: quantized experts are frozen")
        self.model = load_model(folder, dtype).train()
        self._takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        sparse = self._adopt(balance)
        if self.lora is not None:
            of_experts = [m for m in self.lora.modules if m in ("experts", "router")]
            if not sparse and (quantize is not None or (of_experts and self.lora.modules != LoRAConfig().modules)):
                what = f"quantize={quantize!r}" if quantize is not None else f"lora.modules={of_experts}"
                raise ValueError(f"{what}: the model of {folder} is dense, and has no experts")
            if quantize is not None:
                quantize_model(self, quantize)
            wanted = [m for m in self.lora.modules if sparse or m not in of_experts]
            core.add_adapters(self.model, core.LoRA(self.lora.rank, self.lora.alpha), wanted)
        self._freeze_parts(freeze)
        if gradient_checkpointing:
            self.model.activation_checkpointing_enable()

    def _adopt(self, balance: core.Balance | None) -> bool:
        """Adopt the MoE blocks, and return whether there are any."""
        config = self.model.config
        config.output_router_logits = False  # transformers would add a balance loss of its own
        own = float(getattr(config, "router_aux_loss_coef", 0.0) or 0.0)
        if not is_sparse(self.model):
            return False
        try:
            core.adopt(self.model, balance or core.Balance(load_balancing_loss=0.0, router_z_loss=0.0))
        except ValueError as error:
            raise ValueError(f"{self.folder}: {error}") from None
        layers = core.moe_layers(self.model)
        if balance is None and own:
            # transformers' loss counts each of K choices, once for all layers together.
            for layer in layers.values():
                weight = own * float(getattr(layer, "pairs_per_token", 1)) / len(layers)
                layer.balance = core.Balance(load_balancing_loss=weight, router_z_loss=0.0)
        weights = next(iter(layers.values())).balance.weights()
        shown = ", ".join(f"{name}={weight:g}" for name, weight in weights.items() if weight) or "none"
        _logger.info("balance losses of each of the %d MoE layers: %s", len(layers), shown)
        return True

    def _freeze_parts(self, freeze: Sequence[str]) -> None:
        for wanted in freeze:
            layers = core.moe_layers(self.model).values()
            if wanted in ("router", "experts"):
                found = [p for layer in layers for p in getattr(layer, wanted).parameters()]
            else:
                found = [p for name, p in self.model.named_parameters() if fnmatchcase(name, wanted)]
            if not found:
                hint = "" if layers else ", which is dense (--model.freeze '[]' freezes nothing)"
                raise ValueError(f"freeze={wanted!r} names no parameter of {self.folder}{hint}")
            for parameter in found:
                parameter.requires_grad_(False)

    def configure_optimizers(self) -> dict[str, Any]:
        if lost := {p.dtype for p in self.parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}:
            kind = str(lost.pop()).removeprefix("torch.")
            _logger.warning("the weights train in %s, which rounds small steps away: give model.dtype=float32", kind)
        return super().configure_optimizers()

    # ---- the loss

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "predict" and getattr(self.trainer.datamodule, "packed", False):
            inputs = self.model.get_input_embeddings()
            if not keeps_apart(self.model, lambda ids, places: self(ids, places, torch.ones_like(ids)), inputs):
                raise ValueError(
                    f"a {type(self.model).__name__} lets the documents of a row see each other: give data.packed=false "
                    "(--data.packed false), for one document in a row"
                )

    def forward(self, tokens_BL: Tensor, positions_BL: Tensor, valid_BL: Tensor) -> Tensor:
        """Return the logits of the token after each of (B, L) ids, (B, L, V)."""
        # A mask of padding would let the documents of a row see each other.
        given: dict[str, Any] = {"attention_mask": masks_of_documents(self.model, tokens_BL, positions_BL)}
        given |= {"valid_BS": valid_BL} if core.moe_layers(self.model) else {}
        given |= {"position_ids": positions_BL} if self._takes_positions else {}
        logits: Tensor = self.model(input_ids=tokens_BL, use_cache=False, **given).logits
        return logits

    def task_loss(self, batch: HubBatch) -> TaskOutput:
        """Return the mean cross-entropy of the tokens with a label."""
        logits_BLV = self(*self.example_inputs(batch))[:, :-1]
        target_BL = batch.labels_BL[:, 1:]
        nll_N = F.cross_entropy(
            logits_BLV.flatten(0, 1).float(), target_BL.flatten(), ignore_index=IGNORED, reduction="none"
        )
        is_said_BL = target_BL != IGNORED
        count, rows = max(int(is_said_BL.sum()), 1), None
        if not self.training:
            right_B = ((logits_BLV.argmax(-1) == target_BL) & is_said_BL).sum(1)
            columns = (batch.index_B, nll_N.double().view(target_BL.shape).sum(1), right_B, is_said_BL.sum(1))
            rows = [Block(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
        return TaskOutput(nll_N.sum() / count, rows, None, len(batch.tokens_BL), weight=count)

    def example_inputs(self, batch: HubBatch) -> tuple[Tensor, Tensor, Tensor]:
        return batch.tokens_BL, batch.positions_BL, batch.valid_BL

    def cost_unit(self, batch: HubBatch) -> str:
        return f"a row of {batch.tokens_BL.shape[1]} tokens"

    def build_metrics(self) -> RowMetrics:
        return RowMetrics()

    # ---- prediction

    def predict_step(self, batch: list[str], batch_idx: int) -> list[str]:
        return self.predict(batch)

    @property
    def config(self) -> Any:
        """The model's configuration, which a conversion to fewer experts changes."""
        return self.model.config

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The folder's tokenizer."""
        return load_tokenizer(self.folder)

    def ids_of(self, prompt: str) -> list[int]:
        """Return the tokens of a prompt; with a chat template, as a user's message."""
        if not self.tokenizer.chat_template:
            ids: list[int] = self.tokenizer(prompt)["input_ids"]
            return ids
        said = [{"role": "user", "content": prompt}]
        ids = self.tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        return ids

    @torch.no_grad()
    def continued(
        self, prompts: Sequence[str], tell: Callable[[str], None] | None = None, **options: Any
    ) -> list[tuple[list[int], list[int]]]:
        """Return the tokens of each prompt, and of what follows it.

        Args:
            prompts: texts.
            tell: called with the text that follows so far, each time it grows.
            options: fields of ``GenerateConfig``.
        """
        config = from_plain({**vars(self.generate), **options}, GenerateConfig, "generate")
        drawn = {"temperature": config.temperature, "top_p": config.top_p} if config.temperature else {}
        if drawn and self.model.generation_config.top_k is None:
            drawn["top_k"] = 0  # transformers' own default draws from the best 50
        found = []
        for prompt in prompts:
            tokens_1S = torch.tensor([self.ids_of(prompt)], device=self.device)
            with evaluating(self.model), torch.random.fork_rng(devices=cuda_devices(self.model)):
                torch.manual_seed(config.seed)
                out = self.model.generate(
                    tokens_1S, max_new_tokens=config.max_new_tokens, do_sample=bool(drawn),
                    attention_mask=torch.ones_like(tokens_1S), pad_token_id=self.tokenizer.eos_token_id,
                    streamer=None if tell is None else teller(self.tokenizer, tell), **drawn,
                )  # fmt: skip
            read = tokens_1S.shape[1]
            found.append((tokens_1S[0].tolist(), out[0, read:].tolist()))
        return found

    def predict(self, prompts: Sequence[str], **options: Any) -> list[str]:
        """Return the continuation of each prompt; with a chat template, the assistant's answer to it.

        Args:
            prompts: texts, each by itself.
            options: fields of ``GenerateConfig`` that differ from the model's.

        Raises:
            ValueError: one text instead of a list, or an unknown option.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts is one text: give a list of texts")
        return [
            self.tokenizer.decode(written, skip_special_tokens=True)
            for _, written in self.continued(prompts, **options)
        ]

    # ---- files

    @property
    def kept_elsewhere(self) -> frozenset[str]:
        """Names of the tensors that a checkpoint lacks: with ``lora`` those of the folder."""
        if self.lora is None:
            return frozenset()
        return frozenset(self.state_dict()) - {name for name, p in self.named_parameters() if p.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if "state_dict" in checkpoint:
            left_out = self.kept_elsewhere
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in left_out}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        whole = {**{k: v for k, v in self.state_dict().items() if k in self.kept_elsewhere}, **state_dict}
        return super().load_state_dict(whole, strict, assign)

    def on_fit_end(self) -> None:
        """Write the adapter of the best checkpoint, else of the last step, as PEFT's files into the run's folder."""
        if self.lora is None:
            return
        folder, which = Path(self.trainer.default_root_dir) / "adapter", "of the last step"
        kept = {name: value.clone() for name, value in self.state_dict().items() if name not in self.kept_elsewhere}
        for saved in self.trainer.checkpoint_callbacks:
            if isinstance(saved, BestAndLast) and saved.best_score is not None and saved.best_model_path:
                best = self.trainer.strategy.load_checkpoint(saved.best_model_path, weights_only=True)
                self.load_state_dict(best["state_dict"])
                which = f"of the best {saved.monitor} ({saved.best_score:.4g})"
        save_adapters(self.model, folder)
        self.load_state_dict(kept)
        if self.trainer.is_global_zero:
            _logger.info("the adapter %s is in %s", which, folder)

    def merge_adapters(self) -> None:
        """Merge the adapters into the weights, in place.

        Raises:
            ValueError: there are none, or the experts are quantized.
        """
        core.merge_adapters(self.model)
        self.lora = None

    def save_folder(self, folder: str | Path) -> None:
        """Write the model in transformers' layout, adapters merged; the module is of no use afterwards.

        Raises:
            ValueError: quantized experts, which the layout does not have, or sharded ones.
        """
        if needs_all_ranks(self.model):
            raise ValueError("the experts are sharded: load the checkpoint in one process, apps.load(run).save_folder")
        if self.lora is not None:
            self.merge_adapters()
        save_model(core.release(self.model) if core.moe_layers(self.model) else self.model, folder, self.folder)
