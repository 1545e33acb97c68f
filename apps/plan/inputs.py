"""What a model needs of its data, without the data: arguments of its constructor, and a batch on the meta device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

import core
from apps.base.checks import check_at_least
from apps.cli import UsageError
from apps.cli.configs import at
from apps.data.subwords import Subwords
from apps.nets.loss import CHUNK_ELEMENTS
from apps.plan.options import Options

_TEXTS = ("LanguageModeler", "Translator")


@core.register_config
@dataclass(frozen=True)
class Vocabulary(Subwords):
    """Subwords of which the number alone is known."""

    models: tuple[str, ...] = ("",)
    num_ids: int = 0

    def size(self, side: Any) -> int:
        return self.num_ids


@dataclass(frozen=True)
class Loss:
    """What a loss over a vocabulary costs (``apps.nets.loss``).

    Attributes:
        kept: bytes that it keeps for the backward, the gradients of both factors.
        working: bytes that it needs for a while: the transposed weight, the part of its gradient that a chunk adds, and
            a chunk's logits and probabilities.
        flops: FLOPs of its products in a forward.
    """

    kept: float = 0.0
    working: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True)
class Trial:
    """A forward of the model without values.

    Attributes:
        run: calls the network with a batch on the meta device, without the loss.
        examples: examples of the batch.
        tokens: tokens of it, which routers see: of a translation those of a side, of a table its rows.
        loss: what the loss adds, which is not run.
        unit: name of the tokens.
        remark: what else a plan says of the model; empty for nothing.
    """

    run: Callable[[], Any]
    examples: int
    tokens: int
    loss: Loss = Loss()
    unit: str = "tokens"
    remark: str = ""


def data_arguments(kind: str, given: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """Return the arguments of a model's constructor that its data would tell, from configuration and options.

    Args:
        kind: short name of the model's class.
        given: arguments that the configuration has.
        options: of the command.

    Raises:
        UsageError: something is missing; the message names the option.
    """
    _check_columns(kind, options)
    data = options.config.get("data")
    if kind in _TEXTS:
        size = at(data, ("tokenizer", "vocab_size"))
        if size is None:
            raise UsageError("the vocabulary's size comes from the data: give --data.tokenizer.vocab_size N")
        texts: dict[str, Any] = {"subwords": Vocabulary(num_ids=int(size))}
        pairs = at(data, ("pairs",)) or given.get("pairs")
        return {**texts, "pairs": tuple(pairs)} if pairs is not None else texts
    if kind == "VisionClassifier":
        return _image_arguments(given, at(data, ("dataset",)), at(data, ("image_size",)))
    if kind == "ImageTextRetriever":
        return _pair_arguments(given, data)
    if kind == "ImageCaptioner":
        return _caption_arguments(given, data)
    if kind == "MultiTaskRecommender" and "features" not in given:
        return {"features": _features(options, given)}
    if kind in ("NextItemRecommender", "TwoTowerRetriever") and "num_items" not in given:
        raise UsageError("the number of items comes from the data: give --model.num_items N")
    if kind == "TwoTowerRetriever":
        return _sides(given, options)
    if kind == "NextItemRecommender":
        return {"max_length": at(data, ("max_length",)) or 200} if "max_length" not in given else {}
    return {}


def _image_arguments(given: Mapping[str, Any], dataset: Any, image_size: Any) -> dict[str, Any]:
    """Return size, channels and classes of a dataset's images, where the suite knows them."""
    from apps.data.datasets import find
    from apps.registry import import_datasets

    import_datasets()
    spec: Any = None if dataset is None else find(str(dataset))
    known = {
        "image_size": image_size or getattr(spec, "image_size", None),
        "in_chans": getattr(spec, "in_chans", None),
        "num_classes": len(getattr(spec, "class_names", None) or ()) or None,
    }
    missing = [name for name, value in known.items() if value is None and given.get(name) is None]
    if missing:
        raise UsageError(f"{missing[0]} comes from the data, which are not read: give --model.{missing[0]} N")
    return {name: value for name, value in known.items() if given.get(name) is None}


def _pair_arguments(given: Mapping[str, Any], data: Any) -> dict[str, Any]:
    """Return the sizes of images and texts that the data are told, or that their dataset has."""
    from apps.data.datasets import find
    from apps.registry import import_datasets

    import_datasets()
    spec: Any = find(str(at(data, ("dataset",)) or "shapes"))
    names = at(data, ("attributes",)) or spec.attributes
    known = {
        "image_size": at(data, ("image_size",)) or spec.image_size,
        "max_tokens": at(data, ("max_tokens",)),
        "vocab_size": at(data, ("tokenizer", "vocab_size")),
        # Their classes are not known without the data, and cost next to nothing.
        "attributes": dict.fromkeys(names, 1) or None,
    }
    return {name: value for name, value in known.items() if value is not None and given.get(name) is None}


def _caption_arguments(given: Mapping[str, Any], data: Any) -> dict[str, Any]:
    """Return the sizes of images and texts, whose vocabulary must be told: the output has a row for each of its ids."""
    known = _pair_arguments(given, data)
    if "vocab_size" not in {**given, **known}:
        raise UsageError("the vocabulary's size comes from the data: give --data.tokenizer.vocab_size N")
    return {name: value for name, value in known.items() if name != "attributes"}


def _check_columns(kind: str, options: Options) -> None:
    """Refuse options of columns that such a model does not have.

    Raises:
        UsageError: the message names the option.
    """
    tower = ("TwoTowerRetriever",)
    for name in ("tables", "numbers", "histories", "item_tables", "item_numbers"):
        kinds = tower if name.startswith("item_") else ("MultiTaskRecommender", *tower)
        if getattr(options, name) and kind not in kinds:
            raise UsageError(f"--{name} describes columns of {' and '.join(kinds)}, not of {kind}")


def _features(options: Options, given: Mapping[str, Any]) -> Any:
    """Return the columns of a table by their numbers alone."""
    if not options.tables and not options.numbers:
        raise UsageError("a table's columns come from the data: give --tables ROWS ..., and --numbers N")
    if at(given.get("history"), ("pooling",)) == "din" and not options.histories:
        raise UsageError(
            "the histories that history.pooling='din' reads come from the data: give --histories ITEMS ..."
        )
    return replace(
        _columns(options.tables, options.numbers, options, options.histories),
        tasks=tuple(f"task {i}" for i in range(options.tasks)),
        positives=(0.5,) * options.tasks,
        num_domains=options.domains,
    )


def _sides(given: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """Return the columns of both towers, but for those that are given."""
    sides = {
        "user_features": (options.tables, options.numbers, "--tables ROWS ..., and --numbers N"),
        "item_features": (options.item_tables, options.item_numbers, "--item_tables ROWS ..., and --item_numbers N"),
    }
    arguments = {}
    for name, (tables, numbers, flags) in sides.items():
        if name in given:
            continue
        if not tables and not numbers:
            raise UsageError(f"the columns of the {name[:4]}s' tower come from the data: give {flags}")
        arguments[name] = _columns(tables, numbers, options, options.histories if name == "user_features" else ())
    return arguments


def _columns(tables: Sequence[int], numbers: int, options: Options, histories: Sequence[int] = ()) -> Any:
    """Return columns of a table, without tasks: ids with so many rows each, numbers, and histories of these ids."""
    from apps.recsys.encoding.features import CategoricalFeature, ContinuousFeature, Features, SequenceFeature

    return Features(
        categorical=tuple(
            CategoricalFeature(f"column {i}", rows, multi_valued=options.pooling > 1, hashed=True)
            for i, rows in enumerate(tables)
        ),
        continuous=tuple(ContinuousFeature(f"number {i}") for i in range(numbers)),
        sequences=tuple(
            SequenceFeature(f"history {i}", tables[i], length, f"column {i}", hashed=True)
            for i, length in enumerate(histories)
        ),
    )


def trial(module: Any, options: Options, dtype: torch.dtype) -> Trial:
    """Return a forward of a model that is on the meta device.

    Args:
        module: of the suite.
        options: of the command.
        dtype: of the products.

    Raises:
        UsageError: the batch's size is missing, or nothing is known of such a model's batches.
    """
    kind = type(module).__name__
    make = _TRIALS.get(kind)
    if make is None:
        raise UsageError(f"moesaic plan knows no batches of {kind}: there is {', '.join(_TRIALS)}")
    made: Trial = make(module, options, dtype)
    return made


def _batch(options: Options, per_example: int, configured: str = "batch_size") -> int:
    """Return the examples of a GPU, given the tokens of one."""
    if options.tokens is not None:
        if options.tokens % per_example:
            raise ValueError(f"tokens_per_gpu={options.tokens} is no whole number of examples of {per_example} tokens")
        return options.tokens // per_example
    batch = options.batch or at(options.config.get("data"), (configured,))
    if batch is None:
        raise UsageError("the configuration has no batch size: give --batch N or --tokens_per_gpu N")
    check_at_least(1, batch=batch)
    return int(batch)


def _ids(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


def _vocabulary_loss(tokens: int, weight: torch.Tensor, dtype: torch.dtype) -> Loss:
    V, D = weight.shape
    chunk = min(max(CHUNK_ELEMENTS, V), tokens * V)
    size = dtype.itemsize
    return Loss((V * D + tokens * D) * float(size), (2 * V * D + 2 * chunk) * float(size), 2.0 * tokens * V * D)


def _language(module: Any, options: Options, dtype: torch.dtype) -> Trial:
    length = options.length or at(options.config.get("data"), ("block_size",)) or 128
    batch = _batch(options, length)
    tokens = batch * length
    loss = _vocabulary_loss(tokens, module.model.output_weight, dtype)
    return Trial(lambda: module.model.hidden(_ids(batch, length)), batch, tokens, loss)


def _translation(module: Any, options: Options, dtype: torch.dtype) -> Trial:
    length = options.length or 32
    budget = at(options.config.get("data"), ("tokens_per_batch",)) or 4096
    has_size = options.tokens is not None or options.batch is not None
    batch = _batch(options, length) if has_size else max(int(budget) // length, 1)
    tokens = batch * length
    loss = _vocabulary_loss(tokens, module.model.output_weight, dtype)

    def run() -> Any:
        tasks = _ids(batch)
        memory = module.model.encode(_ids(batch, length), tasks, tasks)
        return module.model.decode(_ids(batch, length), memory)

    return Trial(run, batch, tokens, loss, "tokens of a side")


def _images(module: Any, options: Options, dtype: torch.dtype) -> Trial:
    batch = options.batch or _batch(options, 1)
    if options.tokens is not None:
        raise UsageError("images have no number of tokens of their own: give --batch N in place of --tokens_per_gpu")
    size = module.image_size
    image = torch.empty(batch, module.in_chans, size, size, device="meta", dtype=dtype)
    return Trial(lambda: module.model(image), batch, batch, unit="images")


def _captioned(module: Any, options: Options, dtype: torch.dtype) -> Trial:
    length = min(options.length or module.max_tokens, module.max_tokens)
    per_pair = module.model.towers.num_patches + length
    batch = _batch(options, per_pair)
    size = module.image_size
    image = torch.empty(batch, module.in_chans, size, size, device="meta", dtype=dtype)
    loss = Loss(working=4.0 * 4 * batch**2, flops=2.0 * 2 * batch**2 * module.dim)
    return Trial(lambda: module.model(image, _ids(batch, length)), batch, batch * per_pair, loss, "patches and pieces")


def _captions(module: Any, options: Options, dtype: torch.dtype) -> Trial:
    length = min(options.length or module.max_tokens, module.max_tokens)
    batch = _batch(options, length)
    tokens = batch * length
    size = module.image_size
    image = torch.empty(batch, module.in_chans, size, size, device="meta", dtype=dtype)
    loss = _vocabulary_loss(tokens, module.model.output_weight, dtype)
    return Trial(lambda: module.model.decode(_ids(batch, length), module.model.encode(image)), batch, tokens, loss)


def _histories(module: Any, options: Options, dtype: torch.dtype) -> Trial:
    length = min(options.length or module.max_length, module.max_length)
    batch = _batch(options, length)
    tokens = batch * length
    loss = _vocabulary_loss(tokens, module.model.output_weight, dtype)
    return Trial(lambda: module.model.encode(_ids(batch, length)), batch, tokens, loss, "items")


def _table(module: Any, options: Options, dtype: torch.dtype) -> Trial:
    batch = _batch(options, 1)

    def run() -> Any:
        return [_network(member, module.features, batch, dtype) for member in module.members]

    return Trial(run, batch, batch, unit="rows")


def _network(model: Any, features: Any, batch: int, dtype: torch.dtype) -> Any:
    """Run a table's network from the pooled embeddings on."""
    domain = torch.zeros(batch, dtype=torch.int64, device="meta") if model.num_domains else None
    return model.compute(*_read(model, features, batch, dtype), domain)


def _read(model: Any, features: Any, batch: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return what ``TableColumns.read`` returns of a batch, from the pooled embeddings on, which need their gradient.

    Histories are full.

    Raises:
        UsageError: there are histories beside tables that TorchRec shards.
    """
    if features.sequences and model.sparse.collection is not None:
        kind = model.sparse.config.kind
        raise UsageError(
            f"histories are planned with embedding.kind='joined', not {kind!r}: what TorchRec exchanges for them is "
            "not counted"
        )
    parts = []
    if model.sparse.dims:
        pooled = torch.empty(batch, sum(model.sparse.dims), device="meta", dtype=dtype, requires_grad=True)
        parts.append(pooled.expand(model.copies, -1, -1) if model.copies > 1 else pooled)
    if model.vectors is not None:
        parts.append(model.vectors(torch.empty(batch, sum(model.vectors.sizes), device="meta", dtype=dtype)))
    if model.history is not None:
        lengths = {s.name: s.length for s in features.sequences}
        items = _jagged({name: lengths[name] for name in model.history.names}, batch)
        parts.append(model.history(items, model.sparse, parts[0]))
    dense = model.dense(torch.empty(batch, model.num_continuous, device="meta", dtype=dtype))
    return dense, torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0] if parts else None


def _jagged(lengths: Mapping[str, int], batch: int) -> Any:
    """Return rows of items, so many of an example in each column, without values: offsets are given in their place."""
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    sizes = [batch * length for length in lengths.values()]
    return KeyedJaggedTensor(
        keys=list(lengths),
        values=_ids(sum(sizes)),
        lengths=_ids(len(lengths) * batch),
        stride=batch,
        length_per_key=sizes,
        offset_per_key=[0, *itertools.accumulate(sizes)],
    )


def _pairs(module: Any, options: Options, dtype: torch.dtype) -> Trial:
    """Return a forward of both towers, of as many items as pairs, all of them different, and of further negatives.

    The tables' exchange counts as many rows of items as of users.
    """
    batch = _batch(options, 1)
    items, dim = batch + int(at(options.config.get("data"), ("num_uniform",)) or 0), module.tower.dim
    sides = ((module.user_tower, module.user_features, batch), (module.item_tower, module.item_features, items))

    def run() -> Any:
        return [tower.compute(*_read(tower, features, rows, dtype)) for tower, features, rows in sides]

    numbers = (module.num_items + 1) * dim  # the first vector stands for no item
    remark = f"exact search among {module.num_items:,} items: {4e-9 * numbers:.3g} GB, {2 * numbers:.3g} FLOPs a user"
    return Trial(run, batch, batch, _sampled_loss(batch, items, dim), "pairs", remark)


def _sampled_loss(batch: int, items: int, dim: int) -> Loss:
    """Return what the softmax over the items of a batch costs, in float32 whatever the precision.

    It keeps its logarithms and both factors of the products. Beside them are the logits, before and after their
    correction, or in the backward two gradients of their size.
    """
    scores = batch * items
    return Loss(4.0 * (scores + (batch + items) * dim), 2 * 4.0 * scores, 2.0 * scores * dim)


_TRIALS: dict[str, Callable[[Any, Options, torch.dtype], Trial]] = {
    "LanguageModeler": _language,
    "Translator": _translation,
    "VisionClassifier": _images,
    "ImageTextRetriever": _captioned,
    "ImageCaptioner": _captions,
    "NextItemRecommender": _histories,
    "MultiTaskRecommender": _table,
    "TwoTowerRetriever": _pairs,
}
