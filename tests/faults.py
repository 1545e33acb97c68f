"""Draws faults in the code with a seed, plants one at a time into a copy of the tree, and tells which the tests catch.

Run as ``python tests/faults.py --number 50 --output faults.json``, or ``--under core/routing/pairs --number 100`` for
some files. The same command goes on where it was stopped. A fault is caught if a test of the rooms that import its file
fails; ``changed.py`` says which these are, nearest first.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from changed import listed, tests_near, tests_of
from test_imports import ROOT

OTHER: dict[type, type] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
    **{ast.Mod: ast.Mult, ast.Pow: ast.Mult},
}
"""What stands in place of an operator."""


def faults_of(source: str) -> Iterator[tuple[ast.expr | ast.stmt, ast.AST]]:
    """Yield each expression or statement of a file that could be wrong, with the wrong one."""

    def visit(node: ast.AST) -> Iterator[tuple[Any, ast.AST]]:
        match node:
            case ast.Compare(left=left, ops=[op], comparators=right) if type(op) in OTHER:
                yield node, ast.Compare(left, [OTHER[type(op)]()], right)
            case ast.BoolOp(op=op, values=values):
                yield node, ast.BoolOp(OTHER[type(op)](), values)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OTHER and not is_text(left):
                yield node, ast.BinOp(left, OTHER[type(op)](), right)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                yield node, operand
            case ast.Constant(value=bool(value)):
                yield node, ast.Constant(not value)
            case ast.Constant(value=int(value)):
                yield node, ast.Constant(value + 1)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                yield node, ast.IfExp(test, orelse, body)
            case ast.If(test=test, body=body, orelse=orelse):
                yield test, ast.UnaryOp(ast.Not(), test)
            case ast.Expr(value=ast.Call()):
                yield node, ast.Pass()
        for name, value in ast.iter_fields(node):
            # Before Python 3.12 what is in an f-string has no place of its own.
            if name in ("annotation", "returns", "decorator_list", "type_params") or isinstance(node, ast.JoinedStr):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not is_docstring(child):
                    yield from visit(child)

    yield from visit(ast.parse(source))


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def planted(source: str, index: int) -> tuple[int, str, str, str]:
    """Return a file's text with one of its faults, after the line, the right text and the wrong one."""
    right, wrong = [*faults_of(source)][index]
    lines = source.encode().splitlines(keepends=True)
    start = sum(map(len, lines[: right.lineno - 1])) + right.col_offset
    end = sum(map(len, lines[: right.end_lineno - 1])) + right.end_col_offset  # type: ignore[operator]
    text = source.encode()
    new = ast.unparse(ast.fix_missing_locations(wrong))
    new = new if isinstance(wrong, ast.Pass) else f"({new})"
    return right.lineno, text[start:end].decode(), new, (text[:start] + new.encode() + text[end:]).decode()


def drawn(under: list[str], number: int, seed: int) -> list[tuple[str, int]]:
    """Return files and the index of a fault in each, drawn from all places alike."""
    files = sorted(
        path.relative_to(ROOT).as_posix()
        for top in under
        for path in ([ROOT / top] if top.endswith(".py") else (ROOT / top).rglob("*.py"))
    )
    places = [(file, i) for file in files for i, _ in enumerate(faults_of((ROOT / file).read_text("utf-8")))]
    return random.Random(seed).sample(places, min(number, len(places)))


def copy_tree(into: Path) -> None:
    """Copy the files that git knows, and new ones that it does not ignore."""
    for name in listed("ls-files", "--cached", "--others", "--exclude-standard"):
        if (ROOT / name).is_file():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, into / name)


def failing(copy: Path, tests: list[str], workers: int) -> str:
    """Return the first test that fails, or what stopped them; "": none does."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", "--timeout", "120"]
    env = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*command, "-n", str(workers), *tests], cwd=copy, env=env, capture_output=True, text=True, check=False
    )
    if ran.returncode in (0, 5):
        return ""
    lines = [line for line in ran.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[0].split(" - ")[0] if lines else f"pytest ended with {ran.returncode}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--under", nargs="+", default=["core", "apps"], help="files or folders (core apps)")
    parser.add_argument("--number", type=int, default=50, help="faults (50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (0)")
    parser.add_argument("--near", action="store_true", help="run only the tests of the fault's own room")
    parser.add_argument("--workers", type=int, default=2, help="processes of the tests (2)")
    parser.add_argument("--output", type=Path, required=True, help="JSON; faults that it has are not planted again")
    options = parser.parse_args()
    kept: list[dict[str, Any]] = json.loads(options.output.read_text()) if options.output.is_file() else []
    if not options.near:  # what the tests of its own room miss, others may catch
        kept = [one for one in kept if one["caught_by"] or not one["near"]]
    known = {(one["file"], one["index"]) for one in kept}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        copy_tree(copy)
        for file, index in drawn(options.under, options.number, options.seed):
            if (file, index) in known:
                continue
            source = (ROOT / file).read_text("utf-8")
            line, right, wrong, text = planted(source, index)
            (copy / file).write_text(text, encoding="utf-8")
            begin = time.perf_counter()
            by = failing(copy, tests_near(file), options.workers)
            if not by and not options.near:
                by = failing(copy, tests_of([file]), options.workers)
            (copy / file).write_text(source, encoding="utf-8")
            seconds = round(time.perf_counter() - begin)
            one = {"file": file, "index": index, "line": line, "right": right, "wrong": wrong}
            print(f"{file}:{line}: {right!r} -> {wrong!r}: {by or 'NOT CAUGHT'}, {seconds} s", flush=True)
            kept.append({**one, "near": options.near, "caught_by": by, "seconds": seconds})
            options.output.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"caught: {sum(bool(one['caught_by']) for one in kept)} of {len(kept)}")


if __name__ == "__main__":
    main()
