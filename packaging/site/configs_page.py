"""Writes docs/reference/configs.md, the list of all configurations, from the first comment of each file.

Run it after a change of a header, from the root of the tree: ``python packaging/site/configs_page.py``. The page is in
the repository, so that it also reads on a code host; a test says when it is out of date. It has one line per file: the
rest of a header stays in the file, which the line links to.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "configs.md"
_FOLDERS = {
    "vision": "Images",
    "recsys": "Tables, sequences of items and retrieval",
    "nlp": "Translation and language models",
    "multimodal": "Images with texts",
    "routing": "Overlays: routers",
    "experts": "Overlays: experts",
    "training": "Overlays: training",
    "parallel": "Overlays: several processes",
    "suites": "Suites of comparisons",
    ".": "Any run",
}


def summary(file: Path) -> str:
    """Return the first sentence of a configuration's header."""
    header = re.match(r"((?:#.*\n)+)", file.read_text(encoding="utf-8"))[1]  # type: ignore[index]
    text = " ".join(line.removeprefix("#").strip() for line in header.split("\n#\n")[0].splitlines())
    sentence = re.split(r"(?<=\.)\s+(?=[A-Z])", text.removeprefix("Overlay: "))[0].rstrip(".:")
    return sentence[0].upper() + sentence[1:]


def page() -> str:
    """Return the page."""
    lines = [
        "# Configurations",
        "",
        "Each file's header has its commands, data, model, time and score. A run takes one file of an app, and any",
        "number of overlays after it:",
        "",
        "```sh",
        "moesaic fit --config configs/vision/digits.yaml --config configs/routing/switch.yaml",
        "```",
        "",
        "`packaging/site/configs_page.py` writes this page.",
    ]
    for folder, heading in _FOLDERS.items():
        lines += ["", f"## {heading}", "", "| file | content |", "|---|---|"]
        for file in sorted((ROOT / "configs" / folder).glob("*.yaml")):
            name = file.relative_to(ROOT).as_posix()
            lines.append(f"| [{name.removeprefix('configs/')}](../../{name}) | {summary(file)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
