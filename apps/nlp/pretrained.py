"""Modules that may begin with a published checkpoint: its network, and its weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import core
from apps.data.subwords import Subwords
from apps.equal_cost.comparable import Comparable
from apps.nets.config import TransformerConfig
from apps.porting import Architecture, config_of, load_pretrained_weights, subwords_of
from apps.train.module import SparseModule

log = logging.getLogger(__name__)


class PretrainedModule(SparseModule, Comparable):
    """A module with ``model``, ``subwords`` and an argument ``pretrained``, which its constructor sets.

    Attributes:
        pretrained: folder of a published checkpoint, with which the first training or test begins that no checkpoint
            gives its weights; None: none.
    """

    model: Any
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
        return self.twin(moe=moe, replaced_hidden_dim=None)

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


def check_replaced(pretrained: str | None, replaced_hidden_dim: int | None) -> None:
    """Refuse a width of some layers beside published weights, of which all have one.

    Raises:
        ValueError: naming both.
    """
    if pretrained is not None and replaced_hidden_dim is not None:
        raise ValueError(f"replaced_hidden_dim={replaced_hidden_dim} is no width of pretrained={pretrained!r}")


def check_free(pretrained: str | None) -> None:
    """Refuse other experts than those that published weights are of.

    Raises:
        ValueError: there are such weights.
    """
    if pretrained is not None:
        raise ValueError(f"pretrained={pretrained!r} has the weights of its own experts alone: no others are compared")
