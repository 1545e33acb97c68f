"""One task of a sparse translation model as a dense model of its own (Task-MoE, arXiv 2110.03742)."""

from __future__ import annotations

from typing import Any

import torch

import core
from apps.nets.config import TransformerConfig
from apps.nets.transformer import TranslationModel
from apps.nlp.translation.module import Translator


def dense_of_pair(sparse: Translator, pair: str) -> Translator:
    """Return the translator of one language pair alone, which translates it as ``sparse`` does.

    Args:
        sparse: whose router is ``core.Task``.
        pair: one of its pairs, such as "en-de"; data for it are to have this one and ``sparse.subwords``.

    Raises:
        ValueError: another pair, or as ``dense_of_task``.
    """
    part = sparse.part(pair)
    model = dense_of_task(sparse.model, part.task)
    dense = sparse.twin(
        **part.arguments,
        moe=None,
        transformer=sparse.transformer,
        dense_ffn=_dense_ffn(sparse.model.moes[0], sparse.transformer),
        pretrained=None,
    )
    dense.model = model
    return dense.train(sparse.training)


@torch.no_grad()
def dense_of_task(model: TranslationModel, task: int) -> TranslationModel:
    """Return a dense model with the logits that ``model`` has for sequences of ``task``.

    The K experts of a task are one FFN that is K times as wide, their gates in the weights of its output. Shared
    experts join it.

    Args:
        model: its router is ``core.Task``, and nothing is dropped.
        task: as in ``context.task_ids_B``.

    Raises:
        ValueError: there is no such task, or no dense FFN is what the experts of a task are.
    """
    if not model.moes:
        raise ValueError("the model is dense already: it has no tasks to take out")
    if model.attention_moe is not None:
        raise ValueError("attention_moe chooses heads token by token: no dense model does")
    if len(model.moes) > 1:
        raise ValueError(f"moe lists {len(model.moes)} layers: one dense FFN stands for layers that are alike")
    moe = model.moes[0].split(model.config.shape.dim)
    if not isinstance(moe.router, core.Task):
        raise ValueError(f"router {moe.router.source()} does not decide by the task alone, as Task does")
    if not isinstance(moe.expert, core.FFN):
        raise ValueError(f"expert {type(moe.expert).__name__} is not a dense FFN: FFN, SwiGLU and GEGLU are")
    if moe.shared_gate != "none":
        raise ValueError(f"shared_gate={moe.shared_gate!r} weights the experts token by token: no dense FFN does")
    if moe.output_bias:
        raise ValueError("output_bias=True is added beside the experts: no dense FFN has a place for it")
    layers = core.moe_layers(model)
    cut_out = {name: core.cut_out(layer, task=task) for name, layer in layers.items()}
    dense = TranslationModel(
        model.config,
        source_vocab=model.source_vocab,
        target_vocab=None if model.target_vocab == model.source_vocab else model.target_vocab,
        encoder_moe_blocks=model.encoder_moe_blocks,
        decoder_moe_blocks=model.decoder_moe_blocks,
        ffn=_dense_ffn(moe, model.config),
    )
    weights = dict(model.state_dict())
    for name in layers:
        weights = {key: value for key, value in weights.items() if not key.startswith(f"{name}.")}
        own: Any = cut_out[name]
        weights.update({f"{name}.{key}": value for key, value in own.feed_forward().state_dict().items()})
    dense.to(next(model.parameters())).load_state_dict(weights)
    return dense.train(model.training)


def _dense_ffn(moe: core.MoEConfig, transformer: TransformerConfig) -> core.DenseFFN:
    """Return the FFN of all experts that a token takes, side by side."""
    moe = moe.split(transformer.shape.dim)
    assert isinstance(moe.router, core.Task)
    expert = moe.expert
    assert isinstance(expert, core.FFN)
    hidden_dim = (moe.router.top_k + moe.num_shared_experts) * expert.hidden(transformer.shape.dim)
    return core.DenseFFN(hidden_dim, expert.activation, gated=expert.matrices() == 2, bias=expert.bias)
