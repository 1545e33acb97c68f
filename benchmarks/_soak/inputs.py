"""Bad input: valid files, command lines, requests and names, damaged at random, and read as the commands read them.

Each batch runs in a process of its own, so that a crash or a hang ends no other batch. A case may succeed, or fail with
an error of the product's own in one line. It may not write outside its folder nor run what a file holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import io
import itertools
import json
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import tarfile
import traceback
import zipfile
from collections.abc import Callable, Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from apps.base.quiet import quiet
from apps.cli.errors import describe
from benchmarks._soak.load import hub, raw
from benchmarks._soak.outcome import Outcome, generator

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "support"))
WEIGHT = 3
SECONDS, BYTES = 10, 3 << 30
"""Most seconds of the processor that a case may take, and most memory that a process may map beyond what it has."""
EVIL = b"cos\nmkdir\n(S'../ran'\ntR."
"""A pickle that makes a folder where no case may write."""
PIECES = [
    *rb"../../ran|/tmp/ran|<script>alert(1)</script>|NaN|1e999|-1|{}|null|true|,|;|\ud83d|os.system|'".split(b"|"),
    *(
        b"\" onload='x' ",
        b"\0",
        b"\t",
        b"\xff\xfe",
        b"\r\n\r\n",
        b"9" * 30,
        b"[" * 3000,
        b"&a [*a, *a]",
        b"\xe2\x80\xae",
    ),
    b"!!python/object/apply:os.mkdir [../ran]",
]

Files = Mapping[str, bytes]
Read = Callable[[Path], object]


def damaged(data: bytes, rng: np.random.Generator, other: bytes = b"") -> bytes:
    """Return bytes with one to four flips, cuts, repeats, insertions, other numbers or parts of another file."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at, end = sorted(int(i) for i in rng.integers(len(data) + 1, size=2))
        end = min(end, at + int(2 ** rng.uniform(0, 12)))
        kind = rng.integers(8)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del data[at:end]
        elif kind == 2:
            data[at:at] = data[at:end] * int(rng.integers(1, 4))
        elif kind == 3:
            data[at:at] = PIECES[rng.integers(len(PIECES))]
        elif kind == 4:
            data[at : at + 8] = int(rng.choice([0, 2**31 - 1, 2**32, 2**63 - 1])).to_bytes(8, "little")
        elif kind == 5 and (found := list(re.finditer(rb"\d+", data[:100_000]))):
            one = found[rng.integers(len(found))]
            data[one.start() : one.end()] = [b"0", b"-1", b"1e9", b"99999999999", b"0.5", b"NaN"][rng.integers(6)]
        elif kind == 6:
            data[at:end] = other[at:end]
        elif kind == 7 and rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def damaged_inside(name: str, data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """Return a file damaged where its format checks less: in a member of an archive, or a header whose size fits."""
    if rng.random() < 0.5:
        return damaged(data, rng, other)
    if name.endswith((".ckpt", ".zip")):
        packed = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(packed, "w") as new:
            chosen = old.namelist()[rng.integers(len(old.namelist()))]
            for member in old.namelist():
                inner, path = old.read(member), member
                if member == chosen:
                    inner = EVIL if rng.random() < 0.2 else damaged(inner, rng)
                    path = (
                        path if rng.random() < 0.7 else damaged(path.encode(), rng).decode("latin-1").strip("\0") or "x"
                    )
                new.writestr(path, inner)
        return packed.getvalue()
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
    from apps.cli.command import main

    def read(path: Path) -> None:
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            main([str(path) if word == "FILE" else word for word in words])
        said = errors.getvalue()
        assert said.count("\nerror: ") <= 1, said
        assert not re.search("Traceback|--traceback shows", said), said

    return read


def command_line(path: Path) -> None:
    """Read the words of a command, one a line, up to where it would begin to work."""
    import importlib

    from apps.cli.command import _OTHERS
    from apps.cli.options import COMMANDS
    from apps.cli.request import Request

    name, *words = path.read_bytes().decode("utf-8", "surrogateescape").split("\n")
    if name in COMMANDS:
        Request.read(name, words)
    elif name in _OTHERS and name not in ("bench", "data"):
        options = importlib.import_module(f"{_OTHERS[name][0]}.options")
        getattr(options, "Command", options.Options).read(words)


class Elements(HTMLParser):
    """The elements of a page with the names of their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[Any] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, [name for name, value in attributes if not (value or "").startswith("data:")]))


def names_in_a_report(path: Path) -> None:
    """Put a text into each name, title and label of a report, and compare the elements of its page."""
    from made_page import made_page

    from apps.report.page.html import render
    from apps.report.page.writing import from_json, to_json

    def named(value: Any, text: str) -> Any:
        if isinstance(value, Mapping):
            return {key: own if key in ("kind", "file", "class") else named(own, text) for key, own in value.items()}
        if isinstance(value, list):
            return [named(one, text) for one in value]
        return (
            text + value if isinstance(value, str) and value in ("sparse", "dense", "Load", "cat", "block 1") else value
        )

    plain = to_json(made_page(path.parent))
    pages = [render(from_json(named(plain, text))) for text in ("x", path.read_bytes().decode("utf-8", "replace"))]
    elements = [Elements(page).found for page in pages]
    assert elements[0] == elements[1], f"{len(elements[0])} elements became {len(elements[1])}"


def http(path: Path) -> None:
    """Send bytes to a service, and read its answer."""
    answer = asyncio.run(raw(_port(), path.read_bytes(), ends=True))
    assert not answer or re.match(rb"HTTP/1.1 (?:[1234]\d\d|503) ", answer), answer[:200]


@functools.cache
def _port() -> int:
    from served import LIMITS, listening, served_numbers

    return contextlib.ExitStack().enter_context(listening(served_numbers()[0], LIMITS))


def parsers(folder: Path) -> dict[str, tuple[int, str, list[Files], Read]]:
    """Return, by the kind of input: the cases of a batch, the file or "" for the folder to read, valid files, a reader.

    Args:
        folder: an empty one, for what the product itself writes.
    """
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq
    from PIL import Image
    from shown_runs import RUNS

    import apps
    import core
    from apps.cli.command import main
    from apps.cli.configs import read_config
    from apps.compare.suite.file import Suite
    from apps.data.archives import unpack
    from apps.data.text_files import read_lines
    from apps.hub import load_adapters, save_adapters
    from apps.hub.folders import load_model
    from apps.multimodal.readers.rows import rows_of
    from apps.nlp.text.readers import tsv
    from apps.recsys.own_files import read_tables
    from apps.serve.service.application import body_schema
    from apps.serve.service.command import service_of
    from apps.serve.service.options import Limits
    from apps.serve.service.reading import Reader
    from apps.train.checkpoint.loading import check_beside
    from apps.train.publish.exported import ExportedModel
    from apps.vision.image_files import FORMATS, image_of, read_image

    def files(path: Path, names: str = "*") -> Files:
        return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.glob(names)) if p.is_file()}

    table = folder / "table" / "train.csv"
    checkpoints = []
    for name in ("table", "retrieval", "language", "digits"):
        (folder / name).mkdir()
        run = RUNS[name](folder / name)
        checkpoints.append({"best.ckpt": (run / "checkpoints" / "best.ckpt").read_bytes()})
    model = apps.load(run)
    model.save_pretrained(folder / "pretrained")
    main(["export", "--ckpt_path", str(run), "--output", str(folder / "m.onnx")])
    pq.write_table(pa.csv.read_csv(table), folder / "t.parquet")
    plain = load_model(hub(folder / "hub"))
    fresh = lambda: core.adopt(copy.deepcopy(plain))  # noqa: E731
    save_adapters(core.add_adapters(fresh(), core.LoRA(2), modules=["experts"]), folder / "lora")
    with tarfile.open(folder / "a.tar.gz", "w:gz") as tar, zipfile.ZipFile(folder / "a.zip", "w") as zipped:
        for archive_add in (tar.add, zipped.write):
            archive_add(table, "a/train.csv")
    images = []
    for ending, mode in itertools.product(("png", "jpeg", "gif", "webp", "bmp", "tiff"), ("L", "RGB")):
        Image.effect_noise((9, 7), 50).convert(mode).save(image := io.BytesIO(), ending)
        images.append({f"i.{ending}": image.getvalue()})
    docs = "".join(path.read_text() for path in sorted(ROOT.glob("docs/**/*.md")))
    told = [line for line in re.findall(r"^moesaic (\w+ .*[^\\])$", docs, re.MULTILINE) if line.count("'") % 2 == 0]
    words = [{"words": "\n".join(shlex.split(line, comments=True)).encode()} for line in told]
    service = service_of(model)(model)
    reader = Reader(body_schema(service, Limits()), service.read)
    body = json.dumps({"inputs": service.item["examples"]}).encode()
    request = b"POST /predict HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/json\r\nContent-Length: 15\r\n\r\n"
    lines = b"".join(json.dumps({"text": f"line {i}", "n": i, "image": "a.png"}).encode() + b"\n" for i in range(9))
    text = b"ein Haus\ta house\nzwei Hunde\ttwo dogs\n" * 9

    configs = sorted(ROOT.glob("configs/*/*.yaml"))
    init = command("init", "FILE", "--output", "made.yaml")
    return {
        "YAML": (50, "c.yaml", [{"c.yaml": p.read_bytes()} for p in configs], lambda path: (
            check_beside(read_config(path), path), Suite.read(path)
        )),
        "command lines": (20, "words", words, command_line),
        "CSV": (50, "t.csv", [{"t.csv": table.read_bytes()}], lambda path: read_tables([path])),
        "tables of init": (5, "t.csv", [{"t.csv": table.read_bytes()}], init),
        "Parquet": (50, "t.parquet", [files(folder, "t.parquet")], lambda path: read_tables([path])),
        "JSON lines": (100, "t.jsonl", [{"t.jsonl": lines}], lambda path: list(rows_of(path, {"text": "text"}, None))),
        "images": (100, "", images, lambda path: [
            image_of(own.read_bytes(), "image", FORMATS, 10**7) if len(own.read_bytes()) % 2 else read_image(str(own))
            for own in path.iterdir()
        ]),
        "texts": (100, "t.tsv", [{"t.tsv": text}], lambda path: (read_lines(path), tsv.read([path], ["de", "en"]))),
        "archives": (100, "", [files(folder, n) for n in ("a.tar.gz", "a.zip")], lambda path: [
            unpack(own, path / "out") for own in path.glob("a.*")
        ]),
        "checkpoints": (20, "best.ckpt", checkpoints, apps.load),
        "pretrained": (20, "", [files(folder / "pretrained")], apps.load),
        "safetensors": (50, "", [files(folder / "pretrained"), files(folder / "lora")], command("audit", "FILE")),
        "ONNX": (20, "m.onnx", [files(folder, "m.onnx")], ExportedModel.read),
        "adapters": (20, "", [files(folder / "lora")], lambda path: load_adapters(fresh(), path)),
        "names in reports": (5, "name", [{"name": b"a name"}], names_in_a_report),
        "request bodies": (200, "body", [{"body": body}], lambda path: reader.inputs(path.read_bytes())),
        "HTTP": (100, "r.http", [{"r.http": request + b'{"inputs": [2]}'}], http),
    }  # fmt: skip


# ---- the batches


def judged(read: Read, path: Path) -> str:
    """Return what is wrong with how a file was read; "": nothing."""
    from apps.data.cache import SourceFailed
    from apps.serve.service.reading import Refused

    try:
        read(path)
    except (ValueError, OSError, SourceFailed, Refused, SystemExit) as error:
        line = describe(error)[0]
        return f"an error of several lines: {line!r}" if "\n" in line else ""
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{error!r:.400} ({place.filename}:{place.lineno})"
    return ""


def batch(number: int, name: str, parser: tuple[int, str, list[Files], Read], folder: Path) -> Iterator[Outcome]:
    """Read damaged files in a process of its own, and yield a fault for each that went wrong, and the count."""
    count, target, samples, read = parser
    told, seen = folder / "told", folder / "seen"
    told.write_text("")
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException), open(os.devnull, "w") as nothing, open(told, "a") as say:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (mapped + BYTES, mapped + BYTES))
            for i in range(count):
                rng = generator(f"inputs-{name}-{number}", i)
                whole, other = (samples[rng.integers(len(samples))] for _ in range(2))
                chosen = list(whole)[rng.integers(len(whole))]
                shutil.rmtree(seen, ignore_errors=True)
                for file, data in whole.items():
                    (seen / file).parent.mkdir(parents=True, exist_ok=True)
                    spare = other.get(chosen, b"")
                    (seen / file).write_bytes(damaged_inside(file, data, rng, spare) if file == chosen else data)
                os.chdir(seen)
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                say.write(f"{i}\t{judged(read, seen / target)}\n")
                say.flush()
            say.write("end")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    *lines, end = told.read_text(errors="replace").split("\n")
    for line in lines:
        place, _, wrong = line.partition("\t")
        if wrong:
            yield Outcome(number, f"{name}: place {place}", wrong, 0)
    if end != "end":
        yield Outcome(
            number, f"{name}: place {len(lines)}", f"the process ended: status {status}, signal {status & 127}", 0
        )
    outside = sorted(path.name for path in folder.iterdir() if path not in (told, seen))
    if outside or Path("/tmp/ran").exists():
        yield Outcome(number, f"{name}: a batch", f"wrote outside its folder: {outside}", 0)
        shutil.rmtree(folder / "ran", ignore_errors=True)
    yield Outcome(number, f"{name}: a batch", count=max(len(lines), 1))


def cases(numbers: Iterator[int], folder: Path) -> Iterator[Outcome]:
    """Yield batches of the parsers in turn."""
    (folder / "valid").mkdir()
    (folder / "work").mkdir()
    with quiet(own_notes=False):
        read = parsers(folder / "valid")
        for number in numbers:
            name = list(read)[number % len(read)]
            yield from batch(number, name, read[name], folder / "work")
