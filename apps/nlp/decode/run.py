"""Translations, captions and continuations of a model: the functions that other code calls."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import core
from apps.base.messages import warn_once
from apps.data.subwords import BOS_ID, PAD_ID
from apps.nets.norms import RMSNorm
from apps.nlp.decode.config import DecodeConfig
from apps.nlp.decode.constraint import Constraint
from apps.nlp.decode.search import Hypotheses, search
from core.convert.read.calls import evaluating
from core.kernels import cpu

log = logging.getLogger(__name__)

_PACKING = 10
"""Steps of a search in which packing its weights (``cpu.packed``) pays, with more than one row."""


def translate_ids(
    model: Any,
    source_BS: Tensor,
    config: DecodeConfig,
    task_ids_B: Tensor | None = None,
    domain_ids_B: Tensor | None = None,
    index_B: Tensor | None = None,
    constraints: Sequence[Constraint] | None = None,
) -> Hypotheses:
    """Return the translations of a batch.

    Args:
        model: a ``TranslationModel``, or what has its ``encode``, ``start`` and ``step``; evaluated without dropout,
            whichever mode it is in, and ``dropless``. With ``config.dtype`` a copy of it is made, if it has not that
            dtype already: see ``in_dtype``.
        source_BS: int64 (B, S), as in ``TranslationBatch``.
        config: how to search.
        task_ids_B, domain_ids_B: int64 (B,), for the routing context.
        index_B: int64 (B,), the sentences' numbers, which their random draws depend on; None: their places.
        constraints: what each translation may be; the same object may stand for several.

    Raises:
        ValueError: the model's log-probabilities are not finite, or a constraint allows no text that is short enough.
    """
    inputs = (source_BS, task_ids_B, domain_ids_B)
    return _from_memory(model, inputs, _lengths(source_BS), config, index_B, constraints)


def caption_ids(
    model: Any, image: Tensor, config: DecodeConfig, length: int, index_B: Tensor | None = None
) -> Hypotheses:
    """Return the captions that a model writes for each image of a batch.

    Args:
        model: has ``encode(image)``, and ``start`` and ``step`` as a ``TranslationModel``; evaluated as by
            ``translate_ids``.
        image: (B, C, H, W), in the model's dtype or the dtype of ``config``.
        config: how to search.
        length: S in a text's maximal length, for an image has none of its own.
        index_B: int64 (B,), the images' numbers, which their random draws depend on; None: their places.

    Raises:
        ValueError: the model's log-probabilities are not finite.
    """
    image = image if config.dtype is None else image.to(getattr(torch, config.dtype))
    return _from_memory(model, (image,), [length] * len(image), config, index_B)


def _from_memory(
    model: Any,
    inputs: Sequence[Tensor | None],
    lengths: Sequence[int],
    config: DecodeConfig,
    index_B: Tensor | None,
    constraints: Sequence[Constraint] | None = None,
) -> Hypotheses:
    """Search from the start of a text, over what the model's ``encode`` makes of a batch."""
    if not lengths:
        return Hypotheses([], [])
    with _evaluation(model, config.dtype) as model:
        cache = model.start(model.encode(*inputs))
        bos_B1 = torch.full((len(lengths), 1), BOS_ID, device=inputs[0].device)  # type: ignore[union-attr]
        # A text is about as long as its source.
        steps = min(max(lengths), config.max_length(max(lengths)))
        with _steady(model, len(lengths) * config.width, steps):
            return search(model, cache, bos_B1, lengths, config, index_B, constraints)


def generate_ids(
    model: Any,
    prompt_BL: Tensor,
    config: DecodeConfig,
    task_ids_B: Tensor | None = None,
    domain_ids_B: Tensor | None = None,
    index_B: Tensor | None = None,
    constraints: Sequence[Constraint] | None = None,
) -> Hypotheses:
    """Return a language model's continuation of each prompt: the ids that follow it, without the prompt's own.

    Prompts are read a position at a time, in the steps of the search itself: shorter ones start to write earlier.

    Args:
        model: a ``LanguageModel``, or what has its ``start`` and ``step``; evaluated as by ``translate_ids``.
        prompt_BL: int64 (B, L), as training texts start: those of ``TextData`` with ``EOS_ID``, those of Mistral and
            Mixtral with ``BOS_ID``; padded with ``PAD_ID`` after its end.
        config: how to search; S in its maximal length are the prompt's ids.
        task_ids_B, domain_ids_B: int64 (B,), for the routing context.
        index_B: int64 (B,), the prompts' numbers, which their random draws depend on; None: their places.
        constraints: what each continuation may be; the same object may stand for several.

    Raises:
        ValueError: an empty prompt, the model's log-probabilities are not finite, or a constraint allows no text that
            is short enough.
    """
    if not len(prompt_BL):
        return Hypotheses([], [])
    lengths = _lengths(prompt_BL)
    if min(lengths) < 1:
        number = lengths.index(min(lengths))
        raise ValueError(f"prompt {number} is empty: it needs one id at least, such as EOS_ID, with which texts begin")
    with _evaluation(model, config.dtype) as model:
        cache = model.start(len(prompt_BL), task_ids_B, domain_ids_B)
        steps = max(lengths) + config.max_length(max(lengths))
        with _steady(model, len(prompt_BL) * config.width, steps):
            return search(model, cache, prompt_BL, lengths, config, index_B, constraints)


def in_dtype(model: nn.Module, dtype: str | None) -> nn.Module:
    """Return a copy of the model with its weights in ``dtype``; the model itself where they are, or it is None.

    The functions here do it by themselves; with many batches, do it once before them.

    Raises:
        ValueError: the model's experts are offloaded: a copy would have them all in memory.
    """
    weight = next(iter(model.parameters()), None)
    if dtype is None or weight is None or weight.dtype == getattr(torch, dtype):
        return model
    if any(module.cache is not None for module in model.modules() if isinstance(module, core.Experts)):
        raise ValueError(f"decode.dtype={dtype} makes a copy of a model whose experts are offloaded: leave one out")
    return copy.deepcopy(model).to(getattr(torch, dtype))


@contextlib.contextmanager
def dropless(model: nn.Module) -> Iterator[None]:
    """Inside, no layer has the capacity that it has only in training; one with ``eval_capacity_factor`` keeps that, and
    a warning says so once.

    A step of a search is one token of each row of the batch: with a capacity these compete for the experts, so that a
    sentence's translation depends on which others are there, and still open.
    """
    with contextlib.ExitStack() as stack:
        for layer in core.moe_layers(model).values():
            capacity = layer.router.capacity
            if capacity.ratio(training=False) is None:
                continue
            if capacity.eval_factor is None:
                stack.enter_context(core.set_capacity_factor(layer, None))
            else:
                warn_once(
                    log,
                    f"eval_capacity_factor={capacity.eval_factor:g} holds in decoding too: what comes out can depend "
                    "on what else is in the batch; leave it out, or set it to .inf, to decode without a capacity",
                )
        yield


@contextlib.contextmanager
def _evaluation(model: nn.Module, dtype: str | None = None) -> Iterator[Any]:
    """Yield the model without dropout, capacity of training and gradients; afterwards each part is as it was."""
    model = in_dtype(model, dtype)
    with evaluating(model), torch.inference_mode(), dropless(model):
        yield model


@contextlib.contextmanager
def _steady(model: nn.Module, rows: int, steps: int) -> Iterator[None]:
    """Inside, weights do not change: large ones are packed, and norms scaled, once for all steps of a search."""
    with contextlib.ExitStack() as stack:
        if rows > 1 and steps >= _PACKING:
            stack.enter_context(cpu.packed(*getattr(model, "step_weights", list)()))
        for module in model.modules():
            if isinstance(module, RMSNorm):
                stack.enter_context(module.steady())
        yield


def _lengths(ids_BL: Tensor) -> list[int]:
    return (ids_BL != PAD_ID).sum(1).tolist()
