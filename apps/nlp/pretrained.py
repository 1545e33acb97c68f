"""Modules that may begin with a published checkpoint: its network, and its weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import core
from apps.data.subwords import Subwords
from apps.equal_cost.comparable import Baseline, Comparable
from apps.equal_cost.twins import dense_twins
from apps.nets.config import TransformerConfig
from apps.porting import Architecture, config_of, load_pretrained_weights, subwords_of
from apps.train.module import SparseModule

log = logging.getLogger(__name__)


class PretrainedModule(SparseModule, Comparable):
    """A module whose constructor sets ``model``, ``transformer``, ``subwords`` and its argument ``pretrained``.

    Attributes:
        pretrained: folder of a published checkpoint, with which the first training or test begins that no checkpoint
            gives its weights; None: none.
    """

    model: Any
    transformer: TransformerConfig
    subwords: Subwords
    pretrained: str | None = None

    @classmethod
    def defaults_of_none(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        published = arguments.get("pretrained") is not None  # its folder says what the transformer is
        own = {} if published else {"transformer": TransformerConfig()}
        return {**super().defaults_of_none(arguments), **own}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._load_pretrained()

    def with_moe(self, moe: core.MoEConfig) -> Self:
        check_free(self.pretrained)
        return self.twin(moe=moe, dense_ffn=None)

    def baselines(self) -> Mapping[str, Baseline]:
        """Dense models of equal active FLOPs and of equal parameters; only the FFNs in place of experts are wider."""
        twins = dense_twins(self, self.transformer.dense_ffn)
        if self.pretrained is None:
            return twins
        note = f"the weights of pretrained={self.pretrained} are of the sparse model alone"
        return {name: Baseline(None, note) for name in twins}

    def _load_pretrained(self) -> None:
        """Give the model the published weights, unless it has others already.

        Raises:
            ValueError: the network or the subwords are not those of the checkpoint, or as ``load_pretrained``.
        """
        # Not in the constructor: a trained model does not need the folder any more.
        if self.pretrained is not None and self.starts_afresh:
            folder, own = published_folder(self.pretrained), self.subwords
            if subwords_of(folder, own.languages).digest != own.digest:
                raise ValueError(
                    f"the data's subwords are not those of pretrained={self.pretrained}, whose words the model would "
                    f"not know: --data.tokenizer.path {self.pretrained} takes them"
                )
            load_pretrained_weights(self.model, folder)
            log.info("the weights are those of %s", self.pretrained)
        self.starts_afresh = False


def published_folder(pretrained: str) -> Path:
    """The folder itself.

    Raises:
        ValueError: there is none.
    """
    folder = Path(pretrained).expanduser()
    if not folder.is_dir():
        raise ValueError(f"pretrained={pretrained!r} is no folder here, and nothing is fetched from elsewhere")
    return folder


def published_network(pretrained: str, *, is_language_model: bool) -> Architecture:
    """What a published checkpoint's network is.

    Raises:
        ValueError: it is none of this kind, or as ``config_of``.
    """
    found = config_of(published_folder(pretrained))
    if found.is_language_model != is_language_model:
        kinds = ("Translator", "LanguageModeler")
        has, needs = kinds[found.is_language_model], kinds[is_language_model]
        raise ValueError(f"pretrained={pretrained!r} holds a {found.model_type}, which {has} trains, and not {needs}")
    return found


def check_dense_ffn(pretrained: str | None, dense_ffn: core.DenseFFN | None) -> None:
    """Refuse another FFN in some blocks beside published weights, whose blocks are all alike.

    Raises:
        ValueError: naming both.
    """
    if pretrained is not None and dense_ffn is not None:
        raise ValueError(f"dense_ffn={dense_ffn} is no FFN of pretrained={pretrained!r}")


def check_free(pretrained: str | None) -> None:
    """Refuse other experts than those that published weights are of.

    Raises:
        ValueError: there are such weights.
    """
    if pretrained is not None:
        raise ValueError(f"pretrained={pretrained!r} has the weights of its own experts alone: no others are compared")
