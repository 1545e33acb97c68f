"""Which tests a change concerns: those of the changed modules' rooms and of the rooms above that import them.

``python tests/changed.py`` prints them for the working tree, and ``--since REVISION`` for all changes since then. Tests
of other rooms that take a changed module as an example are left out; ``--wide`` prints those as well.
"""

from __future__ import annotations

import argparse
import functools
import re
import subprocess
from collections import defaultdict
from pathlib import PurePosixPath

from test_imports import ROOT, imports, module_name

TOPS = ("core", "apps", "moesaic", "tests")
PAGES = {
    "configs": ["tests/test_configs.py", "tests/test_site.py", "tests/test_typed_commands.py"],
    "docs": ["tests/test_docs.py", "tests/test_figures.py", "tests/test_site.py", "tests/test_typed_commands.py"],
    "README.md": ["tests/test_readme.py", "tests/test_figures.py", "tests/test_typed_commands.py"],
    "pyproject.toml": ["tests/test_packaging.py"],
    "packaging": ["tests/test_packaging.py"],
    "benchmarks": ["tests/core/test_benchmarks.py", "tests/test_gpu_command.py"],
}
"""Tests of files that are not imported, by folder or name."""

NAMES = r"[\w.*]+(?: as \w+)?(?:, \w+(?: as \w+)?)*(?=$|  #)"
IMPORT = re.compile(
    rf"""^[ ]*(import {NAMES}|from [\w.]+ import (?:\([^)]*\)|{NAMES}))|import_module\(("[\w.]+")\)""", re.MULTILINE
)
"""What imports: only these lines are parsed, ten times faster than whole files."""


@functools.cache
def importers() -> dict[str, set[str]]:
    """Return the files that import each file, by path from the root."""
    files = [path.relative_to(ROOT).as_posix() for top in TOPS for path in sorted((ROOT / top).rglob("*.py"))]
    # Tests import those of tests/support by their bare names.
    modules = {module_name(file.removeprefix("tests/support/")): file for file in files}
    found = defaultdict(set)
    for file in files:
        found_in = IMPORT.findall((ROOT / file).read_text("utf-8"))
        lines = "\n".join(line or f"import_module({name})" for line, name in found_in)
        for imported in imports(file, lines):
            parts = imported.target.split(".")
            for n in range(1, len(parts) + 1):  # an import runs the packages above a module too
                if (name := ".".join(parts[:n])) in modules:
                    found[modules[name]].add(file)
    return found


def reached_from(changed: list[str], tests: bool) -> set[str]:
    """Return the changed files and those that import them, through others too; through tests, and tests, if asked."""
    reached, todo = set[str](), list(changed)
    while todo:
        file = todo.pop()
        if file not in reached and (tests or not file.startswith("tests/")):
            reached.add(file)
            todo += importers()[file]
            if PurePosixPath(file).name == "conftest.py":  # fixtures are not imported
                todo += [path.relative_to(ROOT).as_posix() for path in (ROOT / file).parent.rglob("test_*.py")]
    return reached


def rooms_tests(changed: list[str]) -> list[str]:
    """Return those of ``tests_of`` that lie in the rooms of what imports the changed files, or import them."""
    rooms = {str(PurePosixPath("tests", file).parent) for file in reached_from(changed, tests=False)}
    direct = set[str]().union(*(importers()[file] for file in changed if not file.endswith("__init__.py")))
    others = tests_of([file for file in changed if not file.startswith(("apps/", "core/", "moesaic/"))])
    near = {test for test in tests_of(changed) if str(PurePosixPath(test).parent) in rooms or test in direct}
    return sorted(near.union(others))


def tests_of(changed: list[str]) -> list[str]:
    """Return the files of tests that a change of files concerns."""
    reached = reached_from(changed, tests=True)
    found = {file for file in reached if PurePosixPath(file).name.startswith("test_") and (ROOT / file).is_file()}
    for file in changed:
        found |= {test for start, tests in PAGES.items() if f"{file}/".startswith(f"{start}/") for test in tests}
    return sorted(found)


def tests_near(file: str) -> list[str]:
    """Return the folder of tests at the place of a file, or the nearest one above; the package's for one at its top."""
    folder = PurePosixPath("tests", file).with_suffix("")
    single = folder.with_name(f"test_{folder.name}.py")
    while not (ROOT / folder).is_dir():
        folder = folder.parent
    return [str(single)] if (ROOT / single).is_file() and len(folder.parts) < 3 else [str(folder)]


def listed(*arguments: str) -> list[str]:
    """Return the lines that a command of git prints."""
    ran = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return ran.stdout.splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--since", default="HEAD", help="compare the working tree with this revision (HEAD)")
    parser.add_argument("--wide", action="store_true", help="all tests that import a changed module through others")
    options = parser.parse_args()
    changed = listed("diff", "--name-only", options.since) + listed("ls-files", "--others", "--exclude-standard")
    print("\n".join(tests_of(changed) if options.wide else rooms_tests(changed)))


if __name__ == "__main__":
    main()
