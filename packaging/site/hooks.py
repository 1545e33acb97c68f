"""Hooks of ``mkdocs.yml``: the version, the navigation, options of the API pages, links out of docs/, and llms.txt.

Pages link to files of the repository, such as ``../configs/vision/digits.yaml``. On a code host these links work as
they are. In the site each linked file becomes a page under ``source/``, so that a link needs no public address.
"""

from __future__ import annotations

import os
import posixpath
import re
import shutil
import tomllib
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCE = "source"
"""Folder of the site with the linked files of the repository."""

_LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")
_WHOLE_LINK = re.compile(r"(?<!!)\[([^\[\]]*)\]\(([^)\s#]+)\)")
_LANGUAGES = {".yaml": "yaml", ".py": "python", ".toml": "toml", ".sh": "sh"}


def version() -> str:
    """Return the package's version."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])


def slug(heading: str, separator: str = "-") -> str:
    """Return the anchor of a heading as code hosts make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", separator)


def title(page: Path) -> str:
    """Return the first heading of a page."""
    found = re.search(r"^# (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return found[1].replace("`", "") if found else page.stem.replace("_", " ")


def expanded(nav: list[Any], docs: Path) -> list[Any]:
    """Return a navigation with the pages of a folder in the place of each entry ``folder/*``.

    A page or folder that the navigation names elsewhere is left out. The others are sorted by title, an index first. If
    the index lists pages below headings, the headings become sections. A folder below the folder becomes a section.
    ``./*`` means the pages of docs/ itself.
    """
    named = set(_texts(nav))

    def entries(folder: Path, deep: bool) -> list[Any]:
        pages = [page for page in folder.glob("*.md") if page.relative_to(docs).as_posix() not in named]
        pages.sort(key=lambda page: (page.name != "index.md", title(page).lower()))
        made: list[Any] = [page.relative_to(docs).as_posix() for page in pages]
        for heading, listed in _listed(folder / "index.md"):
            section = [
                page for page in ((folder / name).relative_to(docs).as_posix() for name in listed) if page in made
            ]
            made = [page for page in made if page not in section] + ([{heading: section}] if section else [])
        for below in sorted(path for path in folder.iterdir() if deep and path.is_dir()):
            if f"{below.relative_to(docs).as_posix()}/*" in named:
                continue
            if inner := entries(below, deep):
                made.append({below.name.replace("_", " ").capitalize(): inner})
        return made

    def walk(items: list[Any]) -> list[Any]:
        made: list[Any] = []
        for item in items:
            if isinstance(item, str) and item.endswith("/*"):
                folder = docs / item.removesuffix("/*")
                made += entries(folder, deep=folder != docs) if folder.is_dir() else []
            elif isinstance(item, dict):
                ((name, below),) = item.items()
                below = walk(below) if isinstance(below, list) else below
                made += [{name: below}] if below else []
            else:
                made.append(item)
        return made

    return walk(nav)


def _listed(index: Path) -> list[tuple[str, list[str]]]:
    """Return the headings of an index with the pages in the lists below each."""
    text = index.read_text(encoding="utf-8") if index.is_file() else ""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)[1:]
    names = (re.findall(r"^- \[[^\]]*\]\((\w+\.md)\)", part, flags=re.MULTILINE) for part in parts[1::2])
    return list(zip(parts[::2], names, strict=True))


def _texts(nav: Any) -> list[str]:
    """Return the pages that a navigation names, in its order."""
    if isinstance(nav, dict):
        return [text for below in nav.values() for text in _texts(below)]
    if isinstance(nav, list):
        return [text for below in nav for text in _texts(below)]
    return [nav]


def outside(text: str, file: Path, docs: Path) -> list[Path]:
    """Return the files outside of docs/ that a Markdown file links to."""
    targets = (_target(match[1], file) for match in _LINK.finditer(text))
    return [target for target in targets if target and target.is_file() and docs not in target.parents]


def _target(link: str, file: Path) -> Path | None:
    """Return the path that a relative link of ``file`` leads to; None: the link is not relative."""
    return None if ":" in link else Path(os.path.normpath(file.parent / link))


def place(file: Path) -> str:
    """Return the place in the site of the page of a file outside of docs/."""
    name = file.relative_to(ROOT).as_posix()
    return f"{SOURCE}/{name.removesuffix('.md')}.md"


def relinked(text: str, file: Path, uri: str, docs: Path) -> str:
    """Return a page whose links to files outside of docs/ lead to their pages; a link to a folder becomes text.

    Args:
        text: the page.
        file: where its links are relative to.
        uri: place of the page in the site.
        docs: folder of the pages.
    """

    def new(match: re.Match[str]) -> str:
        target = _target(match[1], file)
        if target is None or (docs not in target.parents and ROOT not in target.parents):
            return match[0]
        to = target.relative_to(docs).as_posix() if docs in target.parents else place(target)
        return f"]({posixpath.relpath(to, PurePosixPath(uri).parent.as_posix())}{match[2] or ''})"

    def without_folder(match: re.Match[str]) -> str:
        target = _target(match[2], file)
        return match[1] if target is not None and target.is_dir() else match[0]

    return _LINK.sub(new, _WHOLE_LINK.sub(without_folder, text))


def with_options(text: str) -> str:
    """Return an API page with mkdocstrings' options below each object.

    Below a section's heading an object's own heading is one level deeper. Classes of apps are shown without members:
    their options are arguments.
    """
    made, level = [], 2
    for line in text.splitlines():
        made.append(line)
        if line.startswith("## "):
            level = 3
        elif line.startswith("::: "):
            made += ["    options:", f"      heading_level: {level}"]
            made += ["      members: false"] if line.startswith("::: apps.") else []
    return "\n".join([*made, ""])


def llms_txt(pages: list[tuple[str, str, str]], description: str) -> str:
    """Return the list of pages for language models (llmstxt.org).

    Args:
        pages: place, title and first sentence of each page, in the order of the navigation.
        description: one line about the project.
    """
    lines = [f"- [{name}]({uri}){': ' if first else ''}{first}" for uri, name, first in pages]
    return "\n".join(["# moesaic", "", f"> {description}", "", "## Pages", "", *lines, ""])


def first_sentence(text: str) -> str:
    """Return the first sentence of a page's first paragraph, without links; "" if it begins otherwise."""
    for paragraph in re.split(r"\n\s*\n", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)):
        if re.match(r"[A-Za-z`*\[]", paragraph):
            plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(paragraph.split()))
            return re.split(r"(?<=[.!?])\s", plain)[0].rstrip(":")
    return ""


def on_config(config: Any) -> Any:
    """Set the version, the anchors and the navigation."""
    config.site_name = f"moesaic {version()}"
    config.copyright = f"moesaic {version()}, Apache-2.0"
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug
    config.nav = expanded(config.nav, Path(config.docs_dir))
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each file outside of docs/ that a page links to, or that such a file links to."""
    from mkdocs.structure.files import File, InclusionLevel

    docs, made = Path(config.docs_dir), set()
    waiting = [Path(page.abs_src_path) for page in files.documentation_pages()]
    while waiting:
        file = waiting.pop()
        if file.suffix != ".md":
            continue
        for target in outside(file.read_text(encoding="utf-8"), file, docs):
            if target in made:
                continue
            made.add(target)
            waiting.append(target)
            content = target.read_text(encoding="utf-8")
            if target.suffix == ".md":
                content = relinked(content, target, place(target), docs)
            else:
                name = target.relative_to(ROOT).as_posix()
                content = f"# {name}\n\n````{_LANGUAGES.get(target.suffix, 'text')}\n{content.rstrip()}\n````\n"
            content = f"---\nsearch:\n  boost: 0.2\n---\n\n{content}"
            files.append(File.generated(config, place(target), content=content, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead the links to files outside of docs/ to their pages, and set the options of API pages."""
    if page.file.src_uri.startswith(f"{SOURCE}/"):
        return markdown
    if page.file.src_uri.startswith("reference/api/"):
        markdown = with_options(markdown)
    docs = Path(config.docs_dir)
    return relinked(markdown, docs / page.file.src_uri, page.file.src_uri, docs)


def on_post_build(config: Any) -> None:
    """Write llms.txt, and the pages as Markdown, which it links to."""
    docs, site = Path(config.docs_dir), Path(config.site_dir)
    pages = []
    for uri in _texts(config.nav):
        text = (docs / uri).read_text(encoding="utf-8")
        pages.append((uri, title(docs / uri), first_sentence(text)))
        (site / uri).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(docs / uri, site / uri)
    (site / "llms.txt").write_text(llms_txt(pages, config.site_description), encoding="utf-8")
