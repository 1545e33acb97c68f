"""Bad input: valid files, command lines, requests and names, damaged at random, and read as the commands read them.

Each batch runs in a process of its own, so that a crash or a hang ends no other batch. A case may succeed, or fail with
an error of the product's own in one line. It may not write outside its folder nor run what a file holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import importlib
import io
import itertools
import json
import os
import re
import resource
import shlex
import shutil
import signal
import traceback
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from made_page import Html, made_page
from PIL import Image
from served import LIMITS, listening, served_numbers
from toy_dataset import archive_of

import apps
import core
from apps.base.quiet import quiet
from apps.cli.command import _OTHERS, main
from apps.cli.configs import read_config
from apps.cli.errors import describe
from apps.cli.options import COMMANDS
from apps.cli.request import Request
from apps.compare.suite.file import Suite
from apps.data.archives import unpack
from apps.data.cache import SourceFailed
from apps.data.text_files import read_lines
from apps.hub import load_adapters, save_adapters
from apps.hub.folders import load_model
from apps.multimodal.readers.rows import rows_of
from apps.nlp.text.readers import tsv
from apps.recsys.own_files import read_tables
from apps.report.page.html import render
from apps.report.page.writing import from_json, to_json
from apps.serve.service.application import body_schema
from apps.serve.service.command import service_of
from apps.serve.service.options import Limits
from apps.serve.service.reading import Reader, Refused
from apps.train.checkpoint.loading import check_beside
from apps.train.publish.exported import ExportedModel
from apps.vision.image_files import FORMATS, image_of, read_image
from benchmarks._soak.load import raw, served
from benchmarks._soak.outcome import Outcome, generator

ROOT = Path(__file__).parents[2]
SECONDS, BYTES = 10, 3 << 30
"""Most seconds of the processor that a case may take, and most memory that a process may map beyond what it has."""
EVIL = b"cos\nmkdir\n(S'../ran'\ntR."
"""A pickle that makes a folder where no case may write."""
PIECES = [
    *rb"../../ran|/tmp/ran|<script>alert(1)</script>|NaN|1e999|-1|{}|null|true|,|;|\ud83d|os.system|'".split(b"|"),
    *b"\" onload='x' |\0|\t|\xff\xfe|\r\n\r\n|&a [*a, *a]|\xe2\x80\xae".split(b"|"),
    *(b"9" * 30, b"[" * 3000, b"!!python/object/apply:os.mkdir [../ran]"),
]
NUMBERS = [b"0", b"-1", b"1e9", b"99999999999", b"0.5", b"NaN"]

Files = Mapping[str, bytes]
Read = Callable[[Path], object]
Parser = tuple[int, list[Files], Read]
"""The cases of a batch, valid files that are damaged, and a reader of the only one, or of their folder."""


def damaged(data: bytes, rng: np.random.Generator, other: bytes = b"") -> bytes:
    """Return bytes with one to four flips, cuts, repeats, insertions, other numbers or parts of another file."""
    for _ in range(rng.integers(1, 5)):
        at, end = sorted(int(i) for i in rng.integers(len(data) + 1, size=2))
        end = min(end, at + int(2 ** rng.uniform(0, 12)))
        part, size = data[at:end], int(rng.choice([0, 2**31 - 1, 2**32, 2**63 - 1]))
        changed = [
            bytes(byte ^ 1 << int(rng.integers(8)) for byte in part[:1]) + part[1:],
            b"",
            part * int(rng.integers(2, 5)),
            PIECES[rng.integers(len(PIECES))] + part,
            size.to_bytes(8, "little") + part[8:],
            re.sub(rb"\d+", NUMBERS[rng.integers(len(NUMBERS))], part, count=1),
            other[at:end],
        ]
        data = data[:at] + changed[rng.integers(len(changed))] + data[end:] * bool(rng.random() < 0.96)
    return data


def damaged_inside(name: str, data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """Return a file damaged where its format checks less: in a member of an archive, or a header whose size fits."""
    if rng.random() < 0.5:
        return damaged(data, rng, other)
    if name.endswith((".ckpt", ".zip")):
        with zipfile.ZipFile(io.BytesIO(data)) as packed:
            members = {member: packed.read(member) for member in packed.namelist()}
        chosen = list(members)[rng.integers(len(members))]
        inner = EVIL if rng.random() < 0.2 else damaged(members.pop(chosen), rng)
        renamed = damaged(chosen.encode(), rng).decode("latin-1").strip("\0") if rng.random() < 0.3 else chosen
        return archive_of("zip", {**members, renamed or "x": inner})
    if name.endswith(".safetensors"):
        size = int.from_bytes(data[:8], "little")
        header = damaged(data[8 : 8 + size], rng)
        return len(header).to_bytes(8, "little") + header + data[8 + size :]
    if name.endswith(".http"):
        head, _, body = data.partition(b"\r\n\r\n")
        body = damaged(body, rng)
        return re.sub(rb"Length: \d+", b"Length: %d" % len(body), head) + b"\r\n\r\n" + body
    return damaged(data, rng, other)


# ---- what is read, and how


def command(*words: str) -> Read:
    """Return a reader that runs a command with a file, as a user does."""

    def read(path: Path) -> None:
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            main([str(path) if word == "FILE" else word for word in words])
        said = errors.getvalue()
        assert said.count("\nerror: ") <= 1, said
        assert not re.search("Traceback|--traceback shows", said), said

    return read


def command_line(path: Path) -> None:
    """Read the words of a command, one a line, up to where it would begin to work."""
    name, *words = path.read_bytes().decode("utf-8", "surrogateescape").split("\n")
    if name in COMMANDS:
        Request.read(name, words)
    elif name in _OTHERS and name not in ("bench", "data"):
        options = importlib.import_module(f"{_OTHERS[name][0]}.options")
        (options.Command if hasattr(options, "Command") else options.OPTIONS).read(words)


@functools.cache
def elements(text: str) -> list[tuple[str, list[str]]]:
    """Return the elements of a report with their attributes, after a text is put into each name, title and label."""

    def named(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: own if key in ("kind", "file", "class") else named(own) for key, own in value.items()}
        if isinstance(value, list):
            return [named(one) for one in value]
        return f"{text}{value}" if value in ("sparse", "dense", "Load", "cat", "block 1") else value

    page = Html(render(from_json(named(to_json(made_page(Path.cwd()))))))
    return [(name, list(attributes)) for name, attributes in page.tags]


def names_in_a_report(path: Path) -> None:
    """Put a text into each name, title and label of a report: it makes no element."""
    assert elements(path.read_bytes().decode("utf-8", "replace")) == elements("a name")


def http(path: Path) -> None:
    """Send bytes to a service, and read its answer."""
    try:
        answer = asyncio.run(raw(_port(), path.read_bytes(), ends=True))
    except OSError as error:
        raise AssertionError("the service is gone") from error
    assert not answer or re.match(rb"HTTP/1.1 (?:[1234]\d\d|503) ", answer), answer[:200]


@functools.cache
def _port() -> int:
    return _SERVICES.enter_context(listening(served_numbers()[0], LIMITS))


_SERVICES = contextlib.ExitStack()


def parsers(folder: Path) -> dict[str, Parser]:
    """Return what is read, by its kind.

    Args:
        folder: an empty one, for what the product itself writes.
    """

    def files(pattern: str) -> list[Files]:
        """Return each file that fits, alone."""
        return [{path.name: path.read_bytes()} for path in sorted(folder.glob(pattern))]

    def together(name: str) -> Files:
        return {path.name: path.read_bytes() for path in sorted((folder / name).iterdir())}

    runs = {name: served(name, folder) for name in ("table", "retrieval", "language", "digits")}
    model, plain = apps.load(runs["digits"]), load_model(Path(served("hub", folder)))
    table = folder / "table" / "train.csv"
    for kind in ("zip", "gz"):
        (folder / f"a.{kind}").write_bytes(archive_of(kind, {"a/train.csv": table.read_bytes()}))
    pq.write_table(pa.csv.read_csv(table), folder / "t.parquet")
    model.save_pretrained(folder / "pretrained")
    main(["export", "--ckpt_path", runs["digits"], "--output", str(folder / "m.onnx")])
    fresh = lambda: core.adopt(copy.deepcopy(plain))  # noqa: E731
    save_adapters(core.add_adapters(fresh(), core.LoRA(2), modules=["experts"]), folder / "lora")
    for ending, mode in itertools.product(("png", "jpeg", "gif", "webp", "bmp", "tiff"), ("L", "RGB")):
        Image.effect_noise((9, 7), 50).convert(mode).save(folder / f"image-{mode}.{ending}")
    docs = "".join(path.read_text() for path in sorted(ROOT.glob("docs/**/*.md")))
    told = (line for line in re.findall(r"^moesaic (\w+ .*[^\\])$", docs, re.MULTILINE) if line.count("'") % 2 == 0)
    words = [{"words": "\n".join(shlex.split(line, comments=True)).encode()} for line in told]
    yaml = [{"c.yaml": path.read_bytes()} for path in sorted(ROOT.glob("configs/*/*.yaml"))]
    service = service_of(model)(model)
    reader = Reader(body_schema(service, Limits()), service.read)
    body = json.dumps({"inputs": service.item["examples"]}).encode()
    request = b"POST /predict HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/json\r\nContent-Length: 15\r\n\r\n"
    lines = b"".join(json.dumps({"text": f"line {i}", "n": i, "image": "a.png"}).encode() + b"\n" for i in range(9))
    text = b"ein Haus\ta house\nzwei Hunde\ttwo dogs\n" * 9
    return {
        "configs": (50, yaml, lambda path: check_beside(read_config(path), path)),
        "suites": (10, [{"s.yaml": (ROOT / "configs/suites/recommenders.yaml").read_bytes()}], Suite.read),
        "command lines": (20, words, command_line),
        "CSV": (50, files("table/*.csv"), lambda path: read_tables([path])),
        "tables of init": (5, files("table/*.csv"), command("init", "FILE", "--output", "made.yaml")),
        "Parquet": (50, files("t.parquet"), lambda path: read_tables([path])),
        "JSON lines": (100, [{"t.jsonl": lines}], lambda path: list(rows_of(path, {"text": "text"}, None))),
        "images": (100, files("image*"), lambda path: read_image(str(path))),
        "images of requests": (100, files("image*"), lambda path: image_of(path.read_bytes(), "image", FORMATS, 10**7)),
        "texts": (100, [{"t.tsv": text}], lambda path: (read_lines(path), tsv.read([path], ["de", "en"]))),
        "archives": (100, files("a.*"), lambda path: unpack(path, path.parent / "out")),
        "checkpoints": (20, files("**/best.ckpt"), apps.load),
        "pretrained": (20, [together("pretrained")], apps.load),
        "safetensors": (50, [together("pretrained"), together("lora")], command("audit", "FILE")),
        "ONNX": (20, files("m.onnx"), ExportedModel.read),
        "adapters": (20, [together("lora")], lambda path: load_adapters(fresh(), path)),
        "names in reports": (5, [{"name": b"a name"}], names_in_a_report),
        "request bodies": (200, [{"body": body}], lambda path: reader.inputs(path.read_bytes())),
        "HTTP": (100, [{"r.http": request + b'{"inputs": [2]}'}], http),
    }  # fmt: skip


# ---- the batches


def spoilt(samples: list[Files], rng: np.random.Generator) -> Files:
    """Return a sample with one of its files damaged."""
    whole, other = (samples[rng.integers(len(samples))] for _ in range(2))
    chosen = list(whole)[rng.integers(len(whole))]
    return {**whole, chosen: damaged_inside(chosen, whole[chosen], rng, other.get(chosen, b""))}


def judged(read: Read, sample: Files, folder: Path) -> str:
    """Return what is wrong with how a sample is read, which is written to a new folder; "": nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in sample.items():
        (folder / name).write_bytes(data)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with contextlib.chdir(folder):
            read(folder if len(sample) > 1 else folder / name)
    except (ValueError, OSError, SourceFailed, Refused, SystemExit) as error:
        line = describe(error)[0]
        return f"an error of several lines: {line!r}" if "\n" in line else ""
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{error!a:.400} ({place.filename}:{place.lineno})"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return ""


def batch(number: int, name: str, parser: Parser, folder: Path) -> Iterator[Outcome]:
    """Read damaged files in a process of its own, and yield a fault for each that went wrong, and the count."""
    count, samples, read = parser
    told, seen = folder / "told", folder / "seen"
    told.write_text("")
    if read is not http:  # whose service starts in the process
        with contextlib.redirect_stdout(io.StringIO()):
            judged(read, samples[0], seen)  # imports what is needed once for all processes
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException), open(os.devnull, "w") as nothing, open(told, "a") as say:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (mapped + BYTES, mapped + BYTES))
            for i in range(count):
                sample = spoilt(samples, generator(f"inputs-{name}-{number}", i))
                say.write(f"{judged(read, sample, seen)}\n")
                say.flush()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    lines = told.read_text(errors="replace").split("\n")[:-1]
    lines += [f"the process ended: status {status}, signal {status & 127}"] * (len(lines) < count)
    outside = sorted(path.name for path in folder.iterdir() if path not in (told, seen))
    if outside or Path("/tmp/ran").exists():
        lines.append(f"wrote outside its folder: {outside}")
        shutil.rmtree(folder / "ran", ignore_errors=True)
    for i, wrong in enumerate(lines):
        if wrong:
            yield Outcome(number, f"{name}: place {i}", wrong, 0)
    yield Outcome(number, f"{name}: a batch", count=min(len(lines), count))


def cases(numbers: Iterator[int], folder: Path) -> Iterator[Outcome]:
    """Yield batches of the parsers in turn."""
    (folder / "valid").mkdir()
    (folder / "work").mkdir()
    with quiet(own_notes=False):
        read = parsers(folder / "valid")
        for number in numbers:
            name = list(read)[number % len(read)]
            yield from batch(number, name, read[name], folder / "work")
