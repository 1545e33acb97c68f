"""Writes docs/reference/configs.md, the list of all configurations, from the first comment of each file.

Run it after a change of a header, from the root of the tree: ``python packaging/site/configs_page.py``. The page is in
the repository, so that it also reads on a code host; a test says when it is out of date. It has one line per file: the
rest of a header stays in the file, which the line links to. Overlays that another page describes are only linked.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "configs.md"
_FOLDERS = {
    "vision": "Images",
    "vision/generation": "Drawing images",
    "recsys": "Tables, sequences of items and retrieval",
    "nlp": "Translation and language models",
    "multimodal": "Images with texts",
    "hub": "Models of transformers",
    "training": "Overlays: training",
    "parallel": "Overlays: several processes",
    "suites": "Suites of comparisons",
    ".": "Any run",
}
_DESCRIBED_ELSEWHERE = {
    "routing": ("routers", "routers/index.md#all-routers"),
    "experts": ("experts", "experts.md"),
}


def files(folder: str) -> list[tuple[Path, str, str]]:
    """Return a folder's configurations, each with its name and the target of a link to it."""
    found = sorted((ROOT / "configs" / folder).glob("*.yaml"))
    return [(file, file.stem, f"../../{file.relative_to(ROOT).as_posix()}") for file in found]


def summary(file: Path) -> str:
    """Return the first sentence of a configuration's header, without the number of a paper and the machine."""
    header = re.match(r"((?:#.*\n)+)", file.read_text(encoding="utf-8"))[1]  # type: ignore[index]
    text = " ".join(line.removeprefix("#").strip() for line in header.split("\n#\n")[0].splitlines())
    sentence = re.split(r"(?<=\.)\s+(?=[A-Z])", text.removeprefix("Overlay: "))[0].rstrip(".:")
    sentence = re.sub(r", sized for .* CPU cores?", "", sentence)
    sentence = re.sub(r" \((?:([^()]*), )?arXiv[^()]*\)", lambda found: f" ({found[1]})" if found[1] else "", sentence)
    return sentence[0].upper() + sentence[1:]


def page() -> str:
    """Return the page."""
    lines = [
        "# Configurations",
        "",
        "A run takes one file of an app, and any number of [overlays](../start/commands.md). Each",
        "file's header has commands, data, model, time and score. `packaging/site/configs_page.py` writes this page.",
    ]
    for folder, heading in _FOLDERS.items():
        lines += ["", f"## {heading}", ""]
        lines += [f"- [{name}]({target}): {summary(file)}" for file, name, target in files(folder)]
    lines += ["", "## Overlays described elsewhere"]
    for folder, (title, target) in _DESCRIBED_ELSEWHERE.items():
        links = ",\n".join(f"[{name}]({target})" for _, name, target in files(folder))
        lines += ["", f"`configs/{folder}` ([{title}]({target})):", f"{links}."]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
