"""Published checkpoints as our models, and back: T5, Switch, M2M-100, NLLB-MoE, Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE,
GLM-4.5's layout.

A family has a file, with three pure functions: its configuration in our terms, ours in its, and a table of the
parameters that leads both ways. A folder's ``config.json`` and weights are read as they are, without transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apps.base.checks import check_name
from apps.data.subwords import Subwords
from apps.nets.transformer import LanguageModel
from apps.porting import files, mixtral, nllb, switch
from apps.porting.architecture import Architecture, Family, Model, as_it_is
from apps.porting.parts import Parts, to_ours, to_theirs
from apps.porting.subwords import read_file, read_subwords, write_subwords
from apps.porting.vocabulary import Vocabulary, special_id

__all__ = [
    "Architecture",
    "Vocabulary",
    "config_of",
    "from_published",
    "load_pretrained",
    "load_pretrained_weights",
    "save_pretrained",
    "subwords_of",
    "to_published",
]

FAMILIES: dict[str, Family] = {
    name: family for family in (switch.FAMILY, nllb.FAMILY, mixtral.FAMILY) for name in family.defaults
}


def config_of(folder: str | Path) -> Architecture:
    """Return the architecture of the checkpoint in ``folder``; its ``options()`` are as in a YAML file.

    Raises:
        ValueError: a file that is missing or cannot be read, a model that is not known here or has what ours lack.
    """
    return _open(Path(folder))[0]


def subwords_of(path: str | Path, targets: Sequence[str] = ()) -> Subwords:
    """Return the subwords of a checkpoint, or of your own sentencepiece model, in the order of our ids.

    Args:
        path: the checkpoint's folder, or the model's file.
        targets: languages that are translated into. Of several each has a tag: its piece ``<2xx>`` if there is one,
            else an id that the checkpoint does not use, or one more at the end of your own model. If there are tokens
            ``<2xx>``, a single one has as well.

    Raises:
        ValueError: as ``config_of``, or subwords of another kind, as M2M-100, NLLB, Qwen and OLMoE have; no id for a
            tag.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return read_file(path, targets)
    config = files.read_config(path)
    return read_subwords(path, _family(config["model_type"]).vocabulary(config)[0], targets)


def load_pretrained(folder: str | Path, dtype: torch.dtype | None = None) -> Model:
    """Return the model in ``folder``, its weights in our layout and its vocabulary in our order.

    Args:
        folder: ``config.json``, and ``model.safetensors`` or ``pytorch_model.bin``, whole or in shards.
        dtype: of the model; None: torch's default.

    Raises:
        ValueError: as ``config_of``; or a tensor that is missing, of another shape, or has no place.
    """
    architecture, tensors = _open(Path(folder))
    model = architecture.build().to(dtype or torch.get_default_dtype())
    model.load_state_dict(_weights_in(Path(folder), architecture, tensors))
    return model


def load_pretrained_weights(model: Model, folder: str | Path) -> None:
    """Give a built model the weights in ``folder``. Dropout, capacity and balance losses are the model's own.

    Raises:
        ValueError: as ``load_pretrained``, or the model is not built as that in ``folder``.
    """
    architecture, tensors = _open(Path(folder))
    own = Architecture.of(model, architecture.model_type, architecture.vocabulary)
    if own.is_language_model != architecture.is_language_model:
        raise ValueError(f"a {type(model).__name__} is not what {folder} holds: {architecture.model_type}")
    _compare(_essence(own, model), architecture.essence(), f"of the model is, in {folder},")
    model.load_state_dict(_weights_in(Path(folder), architecture, tensors))


def save_pretrained(
    model: Model,
    folder: str | Path,
    *,
    like: str | Path | None = None,
    model_type: str | None = None,
    subwords: Subwords | None = None,
) -> None:
    """Write ``config.json`` and ``model.safetensors`` that transformers reads, in the dtype of the weights.

    Args:
        model: ours.
        folder: is made if there is none.
        like: folder of the checkpoint the model came from: its ids stay, and values that our model does not say.
        model_type: what to write it as; None: as ``like``, or by the model's parts.
        subwords: to be written as well, as ``spiece.model`` or ``tokenizer.model``; None: no such file.

    Raises:
        ValueError: the published architecture lacks a part of the model, or subwords of this kind.
    """
    config, table, tensors = _publish(model, None if like is None else files.read_config(Path(like)), model_type)
    for alias, name in table.aliases.items():
        if config["tie_word_embeddings"]:
            del tensors[alias]
        else:
            tensors[alias] = tensors[name].clone()  # a reader ties nothing then, and a file shares nothing
    if subwords is not None:
        vocabulary = _family(config["model_type"]).vocabulary(config)[0]
        write_subwords(subwords, Path(folder), config["model_type"], vocabulary)
    files.write(Path(folder), config, tensors)


def from_published(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Architecture, dict[str, Tensor]]:
    """Turn a published configuration and state dict into ours.

    Raises:
        ValueError: as ``load_pretrained``.
    """
    files.check_config(config, Path(files.CONFIG))
    architecture = _read(config, tensors)
    return architecture, _weights(architecture, tensors)


def to_published(
    model: Model, like: Mapping[str, Any] | None = None, model_type: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Turn one of our models into a published configuration and state dict; see ``save_pretrained``.

    Raises:
        ValueError: as ``save_pretrained``.
    """
    config, _, tensors = _publish(model, like, model_type)
    return config, tensors


def _publish(
    model: Model, like: Mapping[str, Any] | None, model_type: str | None
) -> tuple[dict[str, Any], Parts, dict[str, Tensor]]:
    like, (model, given) = dict(like or {}), as_it_is(model)
    model_type = model_type or like.get("model_type") or _model_type(model)
    family = _family(model_type)
    defaults = family.defaults[model_type]
    like = {**defaults, **_start(model, defaults), **like, "model_type": model_type}
    our_size = _vocab_sizes(model)[-1]
    vocabulary = family.vocabulary({**like, "vocab_size": our_size})[0].resized(our_size)
    own, weights = family.fit(Architecture.of(model, model_type, vocabulary), given)
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    written = family.write(own)
    for name in ("eos_token_id", "bos_token_id"):
        if name in written and special_id(like, name) == written[name]:
            del written[name]  # of several ids, all stay
    config = {**like, **written, "dtype": dtype}
    config.pop("torch_dtype", None)  # its older name
    # What their configuration does not say comes out another way when it is read again.
    read = _read(config, {})
    _compare(_essence(own, model), read.essence(), f"cannot be said in {model_type}, which has", besides=("tie",))
    for name, shape in read.shapes().items():
        if name not in weights:
            raise ValueError(f"the model has no {name}, which a {model_type} has")
        if weights[name].shape != shape:
            raise ValueError(f"{name} of shape {tuple(weights[name].shape)} is {tuple(shape)} in {model_type}")
    table = family.parts(own)
    return config, table, to_theirs(table, weights)


def _start(model: Model, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the id that a published decoder starts with, if no published configuration gives it."""
    eos, begin = defaults["eos_token_id"], defaults.get("bos_token_id", defaults.get("pad_token_id"))
    start = eos if model.config.start == "eos" else begin
    return {"bos_token_id": start} if isinstance(model, LanguageModel) else {"decoder_start_token_id": start}


def _open(folder: Path) -> tuple[Architecture, Mapping[str, Tensor]]:
    config = files.read_config(folder)
    _family(config["model_type"])
    tensors = files.Tensors(folder)
    return _read(config, tensors), tensors


def _family(model_type: str) -> Family:
    check_name("model_type", model_type, [*FAMILIES])
    return FAMILIES[model_type]


def _read(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Architecture:
    model_type = config["model_type"]
    try:
        return _family(model_type).read(config, tensors)
    except (TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"config.json of a {model_type} holds a value of another kind than it should: {error}"
        ) from error


def _weights_in(folder: Path, architecture: Architecture, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our weights of the tensors in a folder, which errors name."""
    try:
        return _weights(architecture, tensors)
    except ValueError as error:
        named = str(error) if str(folder) in str(error) else f"{folder}: {error}"
        raise ValueError(named) from error


def _weights(architecture: Architecture, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    family = _family(architecture.model_type)
    tensors = family.published(tensors)
    left_out = [name for name in tensors if name.endswith(family.computed)] if family.computed else []
    if left_out:
        tensors = {name: tensors[name] for name in tensors if name not in left_out}
    return to_ours(family.parts(architecture), tensors, architecture.shapes())


def _essence(own: Architecture, model: Model) -> dict[str, Any]:
    """Return our model's essence, with the sizes of its vocabularies."""
    sizes = sorted(set(_vocab_sizes(model)))
    return {**own.essence(), "vocab_size": sizes[0] if len(sizes) == 1 else tuple(sizes)}


def _vocab_sizes(model: Model) -> tuple[int, ...]:
    return (model.vocab,) if isinstance(model, LanguageModel) else (model.source_vocab, model.target_vocab)


def _model_type(model: Model) -> str:
    """Return the published architecture that has all that the model has."""
    config, moe = model.config, model.moes[0] if model.moes else None
    if isinstance(model, LanguageModel):
        if moe is None:
            return "qwen3" if config.qk_norm == "head" else "qwen2" if config.has_qkv_bias else "mistral"
        if getattr(moe.router, "score_func", None) == "sigmoid":
            return "glm4_moe"
        if config.qk_norm != "none":
            return "qwen3_moe" if config.qk_norm == "head" else "olmoe"
        return "qwen2_moe" if config.has_qkv_bias or moe.num_shared_experts else "mixtral"
    if config.positions == "relative":
        return "t5" if moe is None else "switch_transformers"
    if config.positions == "sinusoidal":
        return "m2m_100" if moe is None else "nllb-moe"
    raise ValueError(f"positions={config.positions!r}: no published encoder-decoder here has them")


def _compare(ours: Mapping[str, Any], theirs: Mapping[str, Any], relation: str, besides: tuple[str, ...] = ()) -> None:
    for name in dict.fromkeys((*ours, *theirs)):
        a, b = ours.get(name), theirs.get(name)
        if a != b and name not in besides:
            raise ValueError(f"{name}={a!r} {relation} {b!r}")
