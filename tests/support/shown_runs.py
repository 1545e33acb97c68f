"""A run of each app with random weights, as a training leaves it, for the page of ``moesaic demo``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import torch
from converted import DIGITS, MOE, classifier, write_run
from copying import MOE as TEXT_MOE, TRANSFORMER, copy_data, translator
from made_pairs import options as pair_options, retriever
from own_table import CONFIG, write

import core
from apps.data.subwords import SubwordConfig

FILMS = ("Alien", "Brazil", "Casablanca", "Dune", "Eraserhead")
TEXT = ["the red fox runs over the green hill", "a blue bird sings in the black tree at night"]


def _saved(folder: Path, module: Any, data: Any, options: dict[str, Any]) -> Path:
    """Write a run with what its checkpoint keeps of its data."""
    module.adopt_encoding({"encoding": data.encoding_state})
    write_run(folder, module, {"class_path": type(data).__name__, "init_args": options})
    return folder


def digits_run(folder: Path) -> Path:
    """8x8 digits in 4 patches; the second block has 4 experts, of which a patch takes 2."""
    from apps.vision.data import VisionData

    return _saved(folder, classifier(MOE), VisionData(**DIGITS["init_args"]), dict(DIGITS["init_args"]))  # type: ignore[call-overload, arg-type]


def table_run(folder: Path) -> Path:
    """A column of every kind; 2 tasks, whose gates weight 3 experts."""
    from apps.recsys.tables.columns.embedding import EmbeddingConfig
    from apps.recsys.tables.data import TableData
    from apps.recsys.tables.module import MultiTaskRecommender

    write(folder)
    files = {"root": str(folder), "train_file": "train.csv", "test_file": "test.csv"}
    options = {"dataset": "table", "cache_dir": str(folder / "cache"), **files}
    data = TableData(**options, table=CONFIG)
    torch.manual_seed(0)
    shared = core.MMoE(num_experts=3, expert=core.MLP(hidden_dims=(4,)))
    module = MultiTaskRecommender(data.features, shared, EmbeddingConfig(dim=2), report=None)
    return _saved(folder / "run", module, data, {**options, "table": json.loads(json.dumps(asdict(CONFIG)))})


def history_run(folder: Path) -> Path:
    """Four users and five films; each block has the two experts of AdaMCT, and 4 in place of its FFN."""
    from apps.recsys.sequence.data import HistoryData
    from apps.recsys.sequence.model import HistoryModelConfig
    from apps.recsys.sequence.module import NextItemRecommender

    watched = [(user, (user + step) % 5) for user in range(4) for step in range(5)]
    columns = {"user": [u for u, _ in watched], "item": [f for _, f in watched], "time": list(range(len(watched)))}
    columns["title"] = [FILMS[film] for film in columns["item"]]
    pa.csv.write_csv(pa.table(columns), folder / "watched.csv")
    file = str(folder / "watched.csv")
    options = {"dataset": "table", "cache_dir": str(folder / "cache"), "file": file, "name_column": "title"}
    data = HistoryData(**options)
    torch.manual_seed(0)
    moe = core.MoEConfig(4, core.TokenChoice(top_k=2), core.FFN(hidden_dim=8))
    module = NextItemRecommender(data.num_items, 6, HistoryModelConfig(dim=8, depth=1), moe, top_k=3)
    return _saved(folder / "run", module, data, options)


def retrieval_run(folder: Path) -> Path:
    """Three users and the five films that they rated; each tower has 4 experts, of which a row takes 2."""
    from apps.recsys.retrieval.data import RetrievalData

    arguments = pair_options(folder, user_column="user", exclude_seen=True)
    data = RetrievalData(**arguments)
    return _saved(folder / "run", retriever(data), data, arguments)


def pairs_run(folder: Path) -> Path:
    """Drawn shapes of 32x32 in 64 patches; the second block has 4 experts, of which a patch or piece takes 2."""
    from small_pairs import MOE as PAIR_MOE, TOWER

    from apps.multimodal.data import ImageTextData
    from apps.multimodal.model import AttributeHead
    from apps.multimodal.module import ImageTextRetriever

    options = {"dataset": "shapes", "cache_dir": str(folder / "cache"), "attributes": ["colour"], "subset": 100}
    data = ImageTextData(**options)  # type: ignore[arg-type]
    torch.manual_seed(0)
    sizes = {name: getattr(data, name) for name in ImageTextRetriever.data_arguments}
    head = AttributeHead(core.MMoE(2, core.MLP((4,))))
    module = ImageTextRetriever(**sizes, tower=TOWER, dim=8, moe=PAIR_MOE, attribute_head=head)
    return _saved(folder / "run", module, data, options)


def translator_run(folder: Path) -> Path:
    """Sentences of four words into two languages; the last decoder block has 4 experts, of which a subword takes 2."""
    data = copy_data(folder, ("de", "fr"))
    torch.manual_seed(0)
    module = translator(data, report=None, encoder_moe_blocks=[0])
    options = {"dataset": "moses", "root": str(folder), "cache_dir": str(folder / "cache"), "pairs": list(data.pairs)}
    options |= {"train_files": "train", "val_files": "val", "test_files": "test"}
    return _saved(folder / "run", module, data, options)


def tasks_run(folder: Path) -> Path:
    """Texts of four words, of which the first or the last is kept; the encoder's block has 4 experts."""
    from tasked import options_of, task_data, text_to_text

    torch.manual_seed(0)
    module = text_to_text(task_data(folder), report=None)
    return _saved(folder / "run", module, task_data(folder), {**options_of(folder), "tokenizer": {}})


def language_run(folder: Path) -> Path:
    """Two sentences many times; the last block has 4 experts, of which a subword takes 2."""
    from apps.nlp.decode import DecodeConfig
    from apps.nlp.language.data import TextData
    from apps.nlp.language.module import LanguageModeler

    (folder / "text.txt").write_text("\n".join(TEXT * 20) + "\n")
    options = {"root": str(folder), "cache_dir": str(folder / "cache"), "train_files": "text.txt"}
    options |= {"val_files": "text.txt", "test_files": "text.txt"}
    data = TextData(**options, tokenizer=SubwordConfig(vocab_size=300))
    torch.manual_seed(0)
    greedy = DecodeConfig("greedy")
    module = LanguageModeler(data.subwords, TRANSFORMER, TEXT_MOE, moe_blocks=[1], decode=greedy)
    return _saved(folder / "run", module, data, options)


def captioner_run(folder: Path) -> Path:
    """Pictures of three colours with sentences; the encoder's and the decoder's last block have 4 experts each."""
    from captioned import DECODER, MOE, VIT
    from made_captions import write_shop

    from apps.multimodal.captions.module import ImageCaptioner
    from apps.multimodal.data import ImageTextData

    options = {"dataset": "image_captions", "root": str(write_shop(folder / "shop")), "image_size": 8, "val_size": 6}
    options |= {"cache_dir": str(folder / "cache"), "test_size": 6}
    data = ImageTextData(**options, tokenizer=SubwordConfig(vocab_size=300))
    torch.manual_seed(0)
    sizes = {"image_size": 8, "vocab_size": data.vocab_size, "max_tokens": data.max_tokens}
    module = ImageCaptioner(VIT, DECODER, MOE, encoder_moe_blocks="last1", **sizes)
    return _saved(folder / "run", module, data, options)


RUNS: dict[str, Callable[[Path], Path]] = {
    "digits": digits_run,
    "table": table_run,
    "history": history_run,
    "retrieval": retrieval_run,
    "pairs": pairs_run,
    "translator": translator_run,
    "tasks": tasks_run,
    "language": language_run,
    "captioner": captioner_run,
}


def shown(folder: Path, most: int = 3) -> tuple[Any, Any]:
    """Return the model of a run, and its app's exhibit with examples of the run's data."""
    from apps.demonstrate.command import exhibit_of, with_examples
    from apps.train.checkpoint.loading import load
    from apps.train.checkpoint.paths import find_checkpoint

    checkpoint = find_checkpoint(folder)
    model = load(checkpoint)
    exhibit, note = with_examples(exhibit_of(model), model, checkpoint, most)
    assert note == ""
    return model, exhibit


def answered(exhibit: Any, *raw: Any) -> Any:
    """Return an exhibit's answer to what stands in its fields."""
    return exhibit.answer([field.read(own) for field, own in zip(exhibit.fields, raw, strict=True)])


def best_experts(routing: Any, most: int = 2) -> list[list[int]]:
    """Return the experts of each token by falling gate, pair by pair."""
    pairs: list[list[tuple[float, int]]] = [[] for _ in range(routing.num_tokens)]
    columns = (routing.token_index_N.tolist(), routing.gates_N.tolist(), routing.expert_ids_N.tolist())
    for token, gate, expert in zip(*columns, strict=True):
        pairs[token].append((-gate, expert))
    return [[expert for _, expert in sorted(own)[:most]] for own in pairs]
