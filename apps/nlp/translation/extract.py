"""One task of a sparse translation model as a dense model of its own (Task-MoE, arXiv 2110.03742)."""

from __future__ import annotations

import torch
from torch import Tensor

import core
from apps.nets.config import TransformerConfig
from apps.nets.transformer import TranslationModel
from apps.nlp.translation.module import Translator


def dense_of_pair(sparse: Translator, pair: str) -> Translator:
    """The translator of one language pair alone, which says what ``sparse`` says of it.

    Args:
        sparse: whose router is ``core.Task``.
        pair: one of its pairs, such as "en-de"; data for it are to have this one and ``sparse.subwords``.

    Raises:
        ValueError: another pair, or as ``dense_of_task``.
    """
    if pair not in sparse.pairs:
        raise ValueError(f"pair {pair!r} is not one of {', '.join(sparse.pairs)}")
    model = dense_of_task(sparse.model, int(sparse.task_P[sparse.pairs.index(pair)]))  # type: ignore[index]
    assert sparse.moe is not None
    dense = sparse.twin(
        pairs=(pair,),
        moe=None,
        transformer=sparse.transformer,
        dense_ffn=_dense_ffn(sparse.moe, sparse.transformer),
        pretrained=None,
        bleu_tokenize=sparse.bleu_tokenizers[pair],
    )
    dense.model = model
    return dense.train(sparse.training)


@torch.no_grad()
def dense_of_task(model: TranslationModel, task: int) -> TranslationModel:
    """A dense model with the logits that ``model`` has for sequences of ``task``.

    The K experts of a task are one FFN that is K times as wide, their gates in the weights of its output. Shared
    experts join it.

    Args:
        model: its router is ``core.Task``, and nothing is dropped.
        task: as in ``context.task_ids_B``.

    Raises:
        ValueError: there is no such task, or no dense FFN is what the experts of a task are.
    """
    moe = model.moe
    if moe is None:
        raise ValueError("the model is dense already: it has no tasks to take out")
    if not isinstance(moe.router, core.Task):
        raise ValueError(f"router {moe.router.source()} does not decide by the task alone, as Task does")
    if not isinstance(moe.expert, core.FFN):
        raise ValueError(f"expert {type(moe.expert).__name__} is not a dense FFN: FFN, SwiGLU and GEGLU are")
    if moe.shared_gate != "none":
        raise ValueError(f"shared_gate={moe.shared_gate!r} weights the experts token by token: no dense FFN does")
    layers = core.moe_layers(model)
    if any(layer.router.capacity.ratio(training=False) is not None for layer in layers.values()):
        raise ValueError("with a capacity what an expert computes depends on the batch: set it to None before")
    dense = TranslationModel(
        model.config,
        source_vocab=model.source_vocab,
        target_vocab=None if model.target_vocab == model.source_vocab else model.target_vocab,
        encoder_moe_blocks=model.encoder_moe_blocks,
        decoder_moe_blocks=model.decoder_moe_blocks,
        ffn=_dense_ffn(moe, model.config),
    )
    weights = dict(model.state_dict())
    for name, layer in layers.items():
        weights = {key: value for key, value in weights.items() if not key.startswith(f"{name}.")}
        found = _dense_weights(layer, task, dense.get_submodule(name))
        weights.update({f"{name}.{key}": value for key, value in found.items()})
    dense.to(next(model.parameters())).load_state_dict(weights)
    return dense.train(model.training)


def _dense_ffn(moe: core.MoEConfig, transformer: TransformerConfig) -> core.DenseFFN:
    """Return the FFN of all experts that a token takes, side by side."""
    assert isinstance(moe.router, core.Task)
    expert = moe.expert
    assert isinstance(expert, core.FFN)
    hidden_dim = (moe.router.top_k + moe.num_shared_experts) * expert.hidden(transformer.shape.dim)
    return core.DenseFFN(hidden_dim, expert.activation, gated=expert.matrices() == 2, bias=expert.bias)


def _dense_weights(layer: core.MoELayer, task: int, ffn: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters of ``ffn`` that is the layer's experts of this task, each by its gate, and the shared ones."""
    chosen = layer.router.experts_of(task)  # type: ignore[operator]
    shared = layer.shared_experts

    def taken(name: str) -> Tensor | None:
        """(n, ...), a parameter of the n experts side by side."""
        own = getattr(layer.experts, name)
        if own is None:
            return None
        return torch.cat([own[chosen.expert_ids_K], *([] if shared is None else [getattr(shared, name)])])

    w_in, w_gate, w_out, b_in, b_out = (taken(name) for name in ("w_in", "w_gate", "w_out", "b_in", "b_out"))
    assert w_in is not None
    assert w_out is not None
    gates_n = chosen.gates_K.new_ones(len(w_out))
    gates_n[: len(chosen.gates_K)] = chosen.gates_K
    found = {name: torch.zeros_like(value) for name, value in ffn.state_dict().items()}
    found["w_in.weight"] = w_in.mT.flatten(0, 1)
    found["w_out.weight"] = (w_out * gates_n[:, None, None]).flatten(0, 1).T
    if w_gate is not None:
        found["w_gate.weight"] = w_gate.mT.flatten(0, 1)
    if b_in is not None and b_out is not None:
        found["w_in.bias"] = b_in.flatten()
        found["w_out.bias"] = (b_out * gates_n[:, None]).sum(0)
    return found
