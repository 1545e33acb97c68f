"""The commands that write files, each on data that are made here, with what an unbroken run of it leaves."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apps.base.files import CONFIGS
from benchmarks._soak.process import Command, fresh, started

SAVES = {"class_path": "apps.train.checkpoint.checkpoints.BestAndLast", "init_args": {"every_n_steps": 2}}
FEW = {"max_epochs": 2, "max_steps": -1, "limit_train_batches": 4, "limit_val_batches": 2, "log_every_n_steps": 1}
OVERLAY = {
    "trainer": {**FEW, "accelerator": "cpu", "accumulate_grad_batches": 1, "log_every_n_steps": 1, "callbacks": [SAVES]}
}
FIT = "fit --run_dir out --ckpt_path last --config"
SOAK = "--config {given}/soak.yaml"
COMPARE = "--overlay {given}/soak.yaml --rounds 0 --baselines dense_equal_flops --output out"
RANKS = "--config {configs}/parallel/expert_parallel.yaml --trainer.devices 2"
EVENTS = "--data.dataset table --data.file {given}/table.csv"
EVENTS += " --data.user_column user --data.item_column item --data.time_column time"
HUB = "--data.folder {given}/model --data.train_files {given}/lines.en --data.block_size 32"
RUNGS = "0.005,0.01,0.02 --seeds 2 --output out"
KINDS = ("jsonl", "csv", "parquet")


@dataclass(frozen=True)
class Work:
    """A command that writes files.

    Attributes:
        name: of the work.
        words: of the command, which writes in the folder it runs in; ``{given}`` has the data, ``{0}`` what it needs.
        needs: names of works whose results it reads.
        repeats: whether another run leaves the same results. A verdict trains as often as its minutes allow.
        ranks: processes that train together.
    """

    name: str
    words: str
    needs: Sequence[str] = ()
    repeats: bool = True
    ranks: int = 1


DIGITS, TEXTS, PORTED = "fit vision", "fit translation", "save_pretrained"
IMAGES, LANGUAGE = "{configs}/vision/digits.yaml", "{configs}/nlp/text_mixtral_like.yaml"
LINES = "--data.dataset text --data.train_files {given}/lines.en --data.tokenizer.vocab_size 400 --data.block_size 16"
WORKS = (
    Work(DIGITS, f"{FIT} {IMAGES} {SOAK}"),
    Work("fit generation", f"{FIT} {{configs}}/vision/generation/digits.yaml {SOAK}"),
    Work("fit tables", f"{FIT} {{0}}/out.yaml {SOAK}", ["init"]),
    Work("fit sequence", f"{FIT} {{configs}}/recsys/movielens_1m_next_item.yaml {SOAK} {EVENTS}"),
    Work(TEXTS, f"{FIT} {{0}}/out.yaml {SOAK}", ["init texts"]),
    Work("fit language", f"{FIT} {LANGUAGE} {SOAK} {LINES}"),
    Work("fit multimodal", f"{FIT} {{configs}}/multimodal/shapes.yaml {SOAK}"),
    Work("fit hub", f"{FIT} {{configs}}/hub/finetune.yaml {SOAK} {HUB}"),
    Work("fit on two ranks", f"{FIT} {IMAGES} {SOAK} {RANKS}", ranks=2),
    Work("init", "init {given}/table.csv --target clicked --output out.yaml"),
    Work("init texts", "init {given}/lines.en {given}/lines.de --output out.yaml"),
    Work("compare", f"compare {IMAGES} {COMPARE} --seeds 1 --learning_rates 0.003 0.01"),
    Work("compare, two jobs", f"compare {IMAGES} {COMPARE} --seeds 2 --learning_rates 0.003 --jobs 2"),
    Work("compare, ladder", f"compare {LANGUAGE} --ladder {RUNGS} --learning_rates 0.003 {LINES}"),
    Work("verdict", "verdict {given}/table.csv --target clicked --minutes 0.3 --output out", repeats=False),
    Work("test", f"test --config {IMAGES} {SOAK} --ckpt_path {{0}}/out --run_dir out", [DIGITS]),
    *(Work(f"predict {kind}", f"predict --ckpt_path {{0}}/out --output out.{kind}", [DIGITS]) for kind in KINDS),
    Work("predict texts", "predict --ckpt_path {0}/out --data.text {given}/lines.en --output out.jsonl", [TEXTS]),
    Work("convert densify", "convert densify --ckpt_path {0}/out --output out", [DIGITS]),
    Work("convert quantize", "convert quantize --how int8 --ckpt_path {0}/out --output out", [DIGITS]),
    Work("convert prune", "convert prune --keep 0.5 --ckpt_path {0}/out --output out", [DIGITS]),
    Work("export onnx", "export --ckpt_path {0}/out --output out.onnx", [DIGITS]),
    Work("export torch", "export --ckpt_path {0}/out --format torch_export --output out.pt2", [DIGITS]),
    Work(PORTED, "save_pretrained {0}/out out", [TEXTS]),
    Work("audit", "audit {0}/out", [PORTED]),
    Work("data", "prepare cache"),
)
FOREIGN = ("keep.txt", "out.txt", ".out.mine", "out.tmp", "cache/keep.txt")
"""Files of somebody else beside the results."""


class Unsound(Exception):
    """A work that fails unbroken."""


class Workshop:
    """Data that are made here, and unbroken runs of the works, each made when it is first asked for.

    Attributes:
        given: folder of both.
        seconds: how long each unbroken run has taken, by the name of its work.
    """

    def __init__(self, folder: Path) -> None:
        self.given, self.seconds = fresh(folder / "given"), dict[str, float]()
        (self.given / "soak.yaml").write_text(json.dumps(OVERLAY))
        draw = np.random.default_rng(0)
        rows = [f"{draw.integers(40)},{draw.integers(30)},{t},{draw.normal():.3f},{'abc'[t % 3]}" for t in range(800)]
        table = [f"{row},{int(draw.random() < 0.3 + 0.4 * row.endswith('a'))}\n" for row in rows]
        (self.given / "table.csv").write_text("user,item,time,size,kind,clicked\n" + "".join(table))
        english = ["open", "close", "save", "the", "a", "new", "file", "folder", "window", "page", "image", "red"]
        for name, words in (("lines.en", english), ("lines.de", [word[::-1] for word in english])):
            draw = np.random.default_rng(1)
            lines = (" ".join(draw.choice(words, draw.integers(3, 9))) + "\n" for _ in range(400))
            (self.given / name).write_text("".join(lines))

    def words(self, work: Work) -> list[str]:
        """Return the words of a command; what it needs is made."""
        if "{given}/model" in work.words:
            _hub_model(self.given / "model")
        needs = [str(self.whole(name)) for name in work.needs]
        places = {"given": self.given, "configs": CONFIGS}
        return [word.format(*needs, **places) for word in work.words.split()]

    def place(self, folder: Path) -> Path:
        """Return a new folder for a command to run in, with files of somebody else."""
        fresh(folder)
        for name in FOREIGN:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("mine\n")
        return folder

    def start(self, work: Work, place: Path, **how: Any) -> contextlib.AbstractContextManager[Command]:
        """Start a command in a folder; see ``started``."""
        log = self.given / f"{time.monotonic_ns()}.log"  # not in the folder, which may be full or vanish
        caches = {"XDG_CACHE_HOME": str(place / "cache"), "MPLCONFIGDIR": str(self.given / "matplotlib")}
        return started(self.words(work), place, log, **caches, **how)

    def whole(self, name: str) -> Path:
        """Return the folder in which an unbroken run of a work was done."""
        place = self.given / re.sub(r"\W+", "_", name)
        if name not in self.seconds:
            work = next(work for work in WORKS if work.name == name)
            with self.start(work, self.place(place)) as command:
                began = time.monotonic()
                fault = command.fault((0,))
                self.seconds[name] = time.monotonic() - began
            if fault:
                raise Unsound(f"unbroken: {fault}")
        return place


def _hub_model(folder: Path) -> None:
    """Write a small random Mixtral with a tokenizer of bytes, unless it is there."""
    if folder.exists():
        return
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    signs = {sign: number for number, sign in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=signs, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "num_local_experts": 4, "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(vocab_size=len(signs), **sizes))
    model.save_pretrained(folder)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
