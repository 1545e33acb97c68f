"""The commands that write files, each on data that are made here, with what an unbroken run of it leaves."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chats
import numpy as np

from apps.base.files import CONFIGS
from benchmarks._soak.process import Command, started

SAVES = {"class_path": "apps.train.checkpoint.checkpoints.BestAndLast", "init_args": {"every_n_steps": 2}}
FEW = {"max_epochs": 2, "max_steps": -1, "limit_train_batches": 4, "limit_val_batches": 2, "log_every_n_steps": 1}
OVERLAY = {"trainer": {**FEW, "accelerator": "cpu", "accumulate_grad_batches": 1, "callbacks": [SAVES]}}
SOAK = "--config {given}/soak.yaml"
FIT = "fit --run_dir out --ckpt_path last --config"
RANKS = "--config {configs}/parallel/expert_parallel.yaml --trainer.devices 2"
COMPARE = "--overlay {given}/soak.yaml --rounds 0 --baselines dense_equal_flops --output out --seeds"
EVENTS = "--data.dataset table --data.file {given}/table.csv"
EVENTS += " --data.user_column user --data.item_column item --data.time_column time"
LINES = "--data.dataset text --data.train_files {given}/lines.en --data.tokenizer.vocab_size 400 --data.block_size 16"
RUNGS = "--data.batch_size 8 --ladder 0.06,0.1,0.15"
HUB = "--data.folder {given}/model --data.train_files {given}/text.txt --data.block_size 32"
IMAGES, LANGUAGE = "{configs}/vision/digits.yaml", "{configs}/nlp/text_mixtral_like.yaml"
DIGITS = "--ckpt_path {fit vision}/out"


@dataclass(frozen=True)
class Work:
    """A command that writes files.

    Attributes:
        name: of the work.
        words: of the command, which writes in the folder it runs in. Braces hold a folder: of the data, or of the
            results of another work.
        repeats: whether another run leaves the same results. A verdict trains as often as its minutes allow.
        ranks: processes that train together.
    """

    name: str
    words: str
    repeats: bool = True
    ranks: int = 1


WORKS = (
    Work("fit vision", f"{FIT} {IMAGES} {SOAK}"),
    Work("fit generation", f"{FIT} {{configs}}/vision/generation/digits.yaml {SOAK}"),
    Work("fit tables", f"{FIT} {{init}}/out.yaml {SOAK}"),
    Work("fit sequence", f"{FIT} {{configs}}/recsys/movielens_1m_next_item.yaml {SOAK} {EVENTS}"),
    Work("fit translation", f"{FIT} {{init texts}}/out.yaml {SOAK}"),
    Work("fit language", f"{FIT} {LANGUAGE} {SOAK} {LINES}"),
    Work("fit multimodal", f"{FIT} {{configs}}/multimodal/shapes.yaml {SOAK}"),
    Work("fit hub", f"{FIT} {{configs}}/hub/finetune.yaml {SOAK} {HUB}"),
    Work("fit on two ranks", f"{FIT} {IMAGES} {SOAK} {RANKS}", ranks=2),
    Work("init", "init {given}/table.csv --target clicked --output out.yaml"),
    Work("init texts", "init {given}/lines.en {given}/lines.de --output out.yaml"),
    Work("compare", f"compare {IMAGES} {COMPARE} 1 --learning_rates 0.003 0.01"),
    Work("compare, two jobs", f"compare {IMAGES} {COMPARE} 1 --learning_rates 0.003 --jobs 2"),
    Work(
        "compare, ladder",
        f"compare {LANGUAGE} {LINES} {RUNGS} --learning_rates 0.003 --seeds 2 --output out",
    ),
    Work("verdict", "verdict {given}/table.csv --target clicked --minutes 0.8 --output out", repeats=False),
    Work("test", f"test --config {IMAGES} {SOAK} {DIGITS} --run_dir out"),
    *(Work(f"predict {kind}", f"predict {DIGITS} --output out.{kind}") for kind in ("jsonl", "csv", "parquet")),
    Work("predict texts", "predict --ckpt_path {fit translation}/out --data.text {given}/lines.en --output out.jsonl"),
    Work("convert densify", f"convert densify {DIGITS} --output out"),
    Work("convert quantize", f"convert quantize --how int8 {DIGITS} --output out"),
    Work("convert prune", f"convert prune --keep 0.5 {DIGITS} --output out"),
    Work("export onnx", f"export {DIGITS} --output out.onnx"),
    Work("export torch", f"export {DIGITS} --format torch_export --output out.pt2"),
    Work("save_pretrained", "publish {fit language}/out out"),
    Work("save_pretrained for transformers", "port {fit language}/out out"),
    Work("audit", "audit {save_pretrained for transformers}/out"),
    Work("data", "prepare cache"),
)
FOREIGN = ("keep.txt", "out.txt", ".out.mine", "out.tmp", "cache/keep.txt")
"""Files of somebody else beside the results."""


class Unsound(Exception):
    """A work that fails unbroken."""


def fresh(folder: Path) -> Path:
    """Return a folder, which is made anew, with files of somebody else."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in FOREIGN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine\n")
    return folder


class Workshop(dict[str, Path]):
    """Folders by what stands for them in braces: of data that are made here, and of unbroken runs of the works.

    Each run is made when it is first asked for.

    Attributes:
        seconds: how long each unbroken run has taken, by the name of its work.
    """

    def __init__(self, folder: Path) -> None:
        given = fresh(folder / "given")
        super().__init__(given=given, configs=CONFIGS)
        self.seconds = dict[str, float]()
        (given / "soak.yaml").write_text(json.dumps(OVERLAY))
        draw = np.random.default_rng(0)
        rows = [f"{draw.integers(40)},{draw.integers(30)},{t},{draw.normal():.3f},{'abc'[t % 3]}" for t in range(800)]
        table = [f"{row},{int(draw.random() < 0.3 + 0.4 * row.endswith('a'))}\n" for row in rows]
        (given / "table.csv").write_text("user,item,time,size,kind,clicked\n" + "".join(table))
        words = np.array(
            ["open", "close", "save", "the", "a", "new", "file", "folder", "window", "page", "image", "red"]
        )
        lines = [" ".join(draw.choice(words, draw.integers(3, 9))) + "\n" for _ in range(400)]
        (given / "lines.en").write_text("".join(lines))
        (given / "lines.de").write_text("".join(line[-2::-1] + "\n" for line in lines))
        chats.write(given)

    def start(self, work: Work, place: Path, **how: Any) -> contextlib.AbstractContextManager[Command]:
        """Start a command in a folder; see ``started``."""
        log = self["given"] / f"{time.monotonic_ns()}.log"  # not in the folder, which may be full or vanish
        caches = {"XDG_CACHE_HOME": str(place / "cache"), "MPLCONFIGDIR": str(self["given"] / "matplotlib")}
        words = re.findall(r"(?:\{[^}]+\}|\S)+", work.words)
        return started([word.format_map(self) for word in words], place, log, **caches, **how)

    def __missing__(self, name: str) -> Path:
        """Return the folder in which an unbroken run of a work was done."""
        work = next(work for work in WORKS if work.name == name)
        place = fresh(self["given"] / re.sub(r"\W+", "_", name))
        with self.start(work, place) as command:
            began = time.monotonic()
            fault = command.fault((0,))
            self.seconds[name] = time.monotonic() - began
        if fault:
            raise Unsound(f"unbroken: {fault}")
        return self.setdefault(name, place)
