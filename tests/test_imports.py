"""Imports run one way. This reads the tree with `ast`: nothing is imported, so a broken module is judged too."""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Each part of core imports from the rows above its own. Only the parts of the last row may also import each other
# (convert needs config), without a cycle. `core/__init__.py` is above them all: nothing inside core imports it.
ROWS = (
    ("fields", "index_buffers", "torch_internals"),
    ("contract", "kernels", "registry"),
    ("routing", "experts", "dispatch", "flops", "optim"),
    ("layers",),
    ("adopted", "config", "parallel", "offload", "quant", "convert", "telemetry", "diagnose", "testing"),
)
ROW_OF = {part: row for row, parts in enumerate(ROWS) for part in parts} | {"": len(ROWS)}
LAST_ROW = len(ROWS) - 1

# The rooms that the apps share, and the apps: each imports from the rows above its own. Rooms of one row may use each
# other in the order in which they are listed; an app uses no other app. Only `registry` knows names below its own row.
APP_ROWS = (
    ("base", "registry"),
    ("data",),
    ("nets", "porting", "train", "report", "task"),
    ("equal_cost", "runner"),
    ("vision", "recsys", "nlp", "multimodal", "hub"),
    ("cli",),
    ("compare", "verdict", "init", "convert", "doctor", "audit", "plan", "serve", "demonstrate", "bench", "demo"),
)
APP_ROW_OF = {room: row for row, rooms in enumerate(APP_ROWS) for room in rooms}
APPS = APP_ROWS[4]
# Rooms of apps that `moesaic` may use: those of the commands that it has as functions. Nothing imports `moesaic`.
COMMANDS = ("base", "train", "cli", "compare", "verdict")
# What `moesaic.tables` may use besides: a table in memory becomes one of recsys.
TABLES = ("data", "recsys")
# Rooms of other apps that an app may use.
MAY_USE: dict[str, tuple[str, ...]] = {"multimodal": ("apps.vision", "apps.nlp.text", "apps.nlp.decode")}

# Files in which "tables" are embedding tables, and not the model of that name.
EMBEDDING_TABLES = ("apps/plan/", "apps/train/checkpoint/sharded.py")

# Parts of core that compute by the functions of ``core.kernels`` alone: a backend is no business of theirs.
BEHIND_THE_SEAM = ("experts", "dispatch", "layers", "config")

# The only files that use what these libraries do not document; each function there has a test of what it relies on.
INTERNALS = (
    "core/torch_internals.py",
    "apps/train/torch_internals.py",
    "apps/train/lightning_internals.py",
    "apps/cli/jsonargparse_internals.py",
    "apps/hub/transformers_internals.py",
)
LIBRARIES = ("torch", "lightning", "jsonargparse")
# Names with an underscore that torch documents, or has for who subclasses its modules or looks at them.
OPEN = {
    *("_apply", "_save_to_state_dict", "_load_from_state_dict", "_parameters", "_buffers", "_modules"),
    *("_forward_hooks", "_forward_pre_hooks", "_values", "_indices", "_version", "_check", "_init_group"),
    *("_foreach_lerp_", "_foreach_mul_", "_foreach_clamp_min_", "_foreach_clamp_max_"),
    *("_inductor", "_in_backward_optimizers"),
}
OPEN_IMPORTS = ("torch._inductor.aoti_compile_and_package",)
# Names with an underscore of others: named tuples, pickle, NLTK, sacreBLEU, TorchRec, torchvision, timm, transformers.
OTHERS = {
    *("_asdict", "_replace", "_catalog", "_extract_corpus_statistics", "_compute_score_from_stats", "_emb_modules"),
    *("_AUGMENTATION_SPACE", "_apply_image_or_video_transform", "_can_record_outputs", "_pos_embed", "_Unpickler"),
}
# Modules of Lightning that its documentation names, and what it does not document though the name has no underscore.
LIGHTNING = "lightning.pytorch"
DOCUMENTED = {
    *(LIGHTNING, f"{LIGHTNING}.callbacks", f"{LIGHTNING}.callbacks.early_stopping", f"{LIGHTNING}.cli"),
    *(f"{LIGHTNING}.loggers", f"{LIGHTNING}.loggers.logger", f"{LIGHTNING}.plugins", f"{LIGHTNING}.plugins.io"),
    *(f"{LIGHTNING}.profilers", f"{LIGHTNING}.strategies", f"{LIGHTNING}.trainer.states", f"{LIGHTNING}.utilities"),
    f"{LIGHTNING}.utilities.exceptions",
}
LOOPS = {"epoch_loop", "val_loop", "validate_loop", "test_loop", "predict_loop"}
# Whose private attributes are never our own, whatever their names.
FOREIGN = ("trainer", "loop", "connector", "optimizer", "scheduler", "parser", "logger")

TRITON_OPS = "core.kernels.triton_ops"
TRITON_JIT = f"{TRITON_OPS}.jit"


@dataclass(frozen=True)
class Import:
    """One imported name: ``target`` is absolute and dotted, ``lazy`` means inside a function."""

    line: int
    target: str
    lazy: bool


parsed = functools.cache(ast.parse)


@functools.cache
def nodes_of(source: str) -> list[ast.AST]:
    return [*ast.walk(parsed(source))]


def called(function: ast.expr) -> str:
    """Return the last name of a function that is called."""
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def module_name(path: str) -> str:
    """Return ``core.kernels.eager`` for ``core/kernels/eager.py``; a package's ``__init__.py`` is the package."""
    parts = PurePosixPath(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: str, source: str) -> Iterator[Import]:
    """Yield every import of a file, also those inside functions and ``if TYPE_CHECKING``."""
    package, nodes = PurePosixPath(path).parts[:-1], nodes_of(source)
    inside = [(node.lineno, node.end_lineno or 0) for node in nodes if runs_later(node)]
    for node in nodes:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = ".".join((*base, *([node.module] if node.module else [])))
            # `from . import cpu` and `from .cpu import f`: a name may be a module
            names = [f"{prefix}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and called(node.func) in ("import_module", "__import__"):
            names = [str(a.value) for a in node.args[:1] if isinstance(a, ast.Constant)]
        for name in names:
            yield Import(node.lineno, name, any(start <= node.lineno <= end for start, end in inside))


def runs_later(node: ast.AST) -> bool:
    """Tell whether what is inside of a node does not run when its module is imported."""
    is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    return is_function or (
        isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    )


def part_of(module: str) -> str:
    """Return the part of core, or the app, that a module lies in; "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


def part_imported(target: str) -> str:
    """Return the part that an imported name lies in; "" where it comes from ``__init__``, as ``core.MoEConfig``."""
    part = part_of(target)
    return part if part in ROW_OF or (ROOT / "core" / f"{part}.py").exists() else ""


def core_rule(module: str, imported: Import) -> str | None:
    """Return why a module of core may not have this import, or None."""
    target, top = imported.target, imported.target.split(".")[0]
    if top == "triton":
        if not module.startswith(TRITON_OPS):
            return f"triton is imported in {TRITON_OPS} alone"
        if not (imported.lazy or module.startswith(TRITON_JIT)):
            return f"outside {TRITON_JIT} triton is imported inside a function, since it may be missing"
        return None
    if target.startswith(TRITON_JIT) and not (imported.lazy or module.startswith(TRITON_JIT)):
        return f"{TRITON_JIT} is imported inside a function, since triton may be missing"
    if top != "core":
        return (
            None if top == "torch" or top in sys.stdlib_module_names else "core imports torch and the standard library"
        )
    here, there = part_of(module), part_imported(target)
    backend = target.split(".")[2] if target.startswith("core.kernels.") else ""
    if here in BEHIND_THE_SEAM and backend in {path.stem for path in (ROOT / "core/kernels").iterdir()}:
        return f"core.{here} uses the functions of core.kernels, and no backend"
    for part in (here, there):
        if part not in ROW_OF:
            return f"core.{part} has no place in the import order: add it to ROWS"
    if here == there or ROW_OF[there] < ROW_OF[here] or ROW_OF[here] == ROW_OF[there] == LAST_ROW:
        return None
    return f"core.{here} may not use {f'core.{there}' if there else 'the package core'}: imports run one way"


def app_rule(module: str, imported: Import) -> str | None:
    """Return why a module of apps may not have this import, or None."""
    here, there = part_of(module), part_of(imported.target)
    if imported.target.split(".")[0] == "moesaic":
        return "nothing imports moesaic: imports run one way"
    if imported.target.split(".")[0] != "apps" or here in (there, ""):
        return None
    if there not in APP_ROW_OF:  # a public name of the package
        return None if here == "cli" or APP_ROW_OF[here] > APP_ROW_OF["cli"] else f"apps.{here} may not use apps itself"
    for room in (here, there):
        if room not in APP_ROW_OF:
            return f"apps.{room} has no place in the import order: add it to APP_ROWS"
    if here in APPS and there in APPS:
        allowed = any(f"{imported.target}.".startswith(f"{room}.") for room in MAY_USE.get(here, ()))
        return None if allowed else f"apps.{here} may not use apps.{there}: an app never imports another"
    if APP_ROW_OF[there] < APP_ROW_OF[here]:
        return None
    row = APP_ROWS[APP_ROW_OF[here]]
    if there in row and row.index(there) < row.index(here):
        return None
    return f"apps.{here} may not use apps.{there}: imports run one way"


def moesaic_rule(module: str, imported: Import) -> str | None:
    """Return why a module of moesaic may not have this import, or None."""
    room = part_of(imported.target)
    if module == "moesaic" and not imported.lazy and imported.target.split(".")[0] not in sys.stdlib_module_names:
        return "an import of moesaic imports nothing but the standard library"
    may_use = (*COMMANDS, *(TABLES if module == "moesaic.tables" else ()))
    if imported.target.split(".")[0] == "apps" and room in APP_ROW_OF and room not in may_use:
        return f"moesaic may not use apps.{room}: it calls the commands"
    return None


def registered() -> tuple[set[str], set[str]]:
    """Return the names of the public classes of models and data, and those of the models' folders."""
    nodes = parsed((ROOT / "apps/registry.py").read_text(encoding="utf-8")).body
    tables = {ast.unparse(node.targets[0]): node.value for node in nodes if isinstance(node, ast.Assign)}
    models, data = (ast.literal_eval(tables[name]) for name in ("MODELS", "DATA"))
    return {*models, *data}, {room.rpartition(".")[2] for room in models.values()}


def names_of_apps(path: str, source: str) -> list[str]:
    """Return a line for each text of a shared room that names an app, one of its models or the class of its data.

    Docstrings may name them.
    """
    if part_of(module_name(path)) in (*APPS, "registry"):
        return []
    classes, models = registered()
    models -= {"tables"} if path.startswith(EMBEDDING_TABLES) else set()
    named = re.compile(rf"\bapps[./]({'|'.join(APPS)})\b|\b({'|'.join(classes)})\b|^({'|'.join(models)})$")
    nodes = nodes_of(source)
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    return [
        f"{path}:{text.lineno}: names an app in {text.value!r}: apps/registry.py alone knows the apps"
        for text in nodes
        if isinstance(text, ast.Constant) and isinstance(text.value, str) and id(text) not in docstrings
        if named.search(text.value)
    ]


def violations(path: str, source: str) -> list[str]:
    """Return a line for each import in a file that breaks a rule."""
    module = module_name(path)
    top = module.split(".")[0]
    rule = {"core": core_rule, "apps": app_rule, "moesaic": moesaic_rule}[top]
    broken = ((imported, rule(module, imported)) for imported in imports(path, source))
    return [f"{path}:{imported.line}: imports {imported.target}: {why}" for imported, why in broken if why]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_"


def attribute(node: ast.AST) -> tuple[ast.expr, str] | None:
    """Return object and name of an attribute that a node reads or sets, also by ``getattr``; else None."""
    match node:
        case ast.Attribute(value=value, attr=name):
            return value, name
        case ast.Call(
            func=ast.Name(id="getattr" | "hasattr" | "setattr" | "delattr"),
            args=[value, ast.Constant(value=str(name)), *_],
        ):
            return value, name
    return None


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def private_names(sources: dict[str, str]) -> set[str]:
    """Return the private names that files define: functions, classes, variables, and attributes of ``self``."""
    names: set[str] = set()
    for node in (node for path, source in sources.items() for node in nodes_of(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names.add(node.attr)
    return {name for name in names if is_private(name)}


def used_privately(sources: dict[str, str]) -> set[str]:
    """Return the private names that ``INTERNALS`` use, which are the libraries'."""
    nodes = (node for path in INTERNALS for node in nodes_of(sources[path]))
    return {found[1] for node in nodes if (found := attribute(node)) and is_private(found[1])} - OPEN


def reaches(path: str, source: str, own: set[str], theirs: set[str]) -> list[str]:
    """Return a line for each use in a file of what torch, Lightning and jsonargparse do not document.

    Args:
        path: the file.
        source: its text.
        own: private names that the tree defines.
        theirs: private names that are the libraries', though the tree may define one too.
    """
    found = []
    for target in imports(path, source):
        top, *rest = target.target.split(".")
        hidden = any(is_private(part) for part in rest) and target.target not in OPEN_IMPORTS
        if top in LIBRARIES and (hidden or (top == "lightning" and rest and parent(target.target) not in DOCUMENTED)):
            found.append(f"{path}:{target.line}: imports {target.target}")
    for node in nodes_of(source):
        if isinstance(node, ast.FunctionDef) and node.name in theirs:
            found.append(f"{path}:{node.lineno}: overrides {node.name}")
        value, name = attribute(node) or (None, "")
        if value is None or not (name in LOOPS or is_private(name)) or name in OPEN | OTHERS:
            continue
        if name not in own or name in theirs or ast.unparse(value).lower().endswith(FOREIGN):
            found.append(f"{path}:{value.lineno}: uses {ast.unparse(value)}.{name}")
    return [f"{line}, which its library does not document: put it into one of {INTERNALS}" for line in found]


def parent(target: str) -> str:
    return target.rpartition(".")[0]


def tree() -> dict[str, str]:
    files = (path for top in ("core", "apps", "moesaic") for path in sorted((ROOT / top).rglob("*.py")))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}


def test_the_tree_keeps_the_rules():
    sources = tree()
    assert {"core/__init__.py", "core/contract/tape.py", "apps/__init__.py"} <= set(sources)
    broken = [line for path, source in sources.items() for line in violations(path, source)]
    broken += [
        line for path, source in sources.items() if path.startswith("apps") for line in names_of_apps(path, source)
    ]
    assert not broken, "\n".join(broken)


def test_only_the_files_for_it_use_what_a_library_does_not_document():
    sources = tree()
    others = {path: source for path, source in sources.items() if path not in INTERNALS}
    assert len(others) == len(sources) - len(INTERNALS)
    own, theirs = private_names(others), used_privately(sources)
    assert {"_trainer", "_device_mesh", "_hparams_initial", "_cdata"} <= theirs
    found = [line for path, source in others.items() for line in reaches(path, source, own, theirs)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "from lightning.fabric.utilities.logger import _flatten_dict",
        "from lightning.pytorch.utilities.model_helpers import is_overridden",
        "def f():\n    from jsonargparse import _typehints",
        "import torch._dynamo",
        "from torch.distributed._composable import checkpoint",
        "trainer._signal_connector.received_sigterm = True",
        "self._trainer.world_size",  # where a class of ours has an attribute of this name, too
        "trainer._own",
        "trainer.fit_loop.epoch_loop.batch_progress",
        "hasattr(module, '_hparams_initial')",
        "optimizer._step_supports_amp_scaling = False",
        "torch._C._functorch.is_batchedtensor(x)",
        "class Bar:\n    def _init_progress(self, trainer): ...",
    ],
)
def test_a_reach_into_a_library_is_found(source):
    assert reaches("apps/train/a.py", source, {"_own", "_trainer"}, {"_trainer", "_init_progress"})


@pytest.mark.parametrize(
    "source",
    ["self._own = part._own", "super()._apply(f)", "batch._replace(x=1)", "from lightning.pytorch import Trainer"],
)
def test_a_private_name_of_our_own_is_no_reach(source):
    assert reaches("apps/train/a.py", source, {"_own"}, {"_trainer"}) == []


@pytest.mark.parametrize("top", ["core", "apps", "moesaic"])
def test_modules_import_each_other_without_a_cycle(top):
    # Also imports inside functions and for type checkers: they stop no import, and hide which file is the upper one.
    sources = {module_name(path): (path, source) for path, source in tree().items() if path.startswith(f"{top}/")}
    graph: dict[str, set[str]] = {}
    for module, (path, source) in sources.items():
        targets = (name.target for name in imports(path, source))
        known = {t if t in sources else t.rpartition(".")[0] for t in targets}
        graph[module] = {t for t in known & set(sources) if t != module}
    while free := [module for module, needs in graph.items() if not needs & set(graph)]:
        for module in free:
            del graph[module]
    assert not graph, f"a cycle among {sorted(graph)}"


@pytest.mark.parametrize(
    "path, source, found",
    [
        ("apps/serve/a.py", "f('apps.vision.data.VisionData')", True),
        ("apps/cli/a.py", "f(f'such as VisionData {x}')", True),
        ("apps/verdict/a.py", "kind == 'translation'", True),
        ("apps/plan/a.py", "x = 'retrieval'", True),
        ("apps/plan/a.py", "costs['tables']", False),  # of embeddings
        ("apps/train/a.py", "costs['tables']", True),
        ("apps/serve/a.py", 'def f():\n    """Serve a Translator."""', False),
        ("apps/report/a.py", "f('--config configs/vision/digits.yaml', 'a table of languages')", False),
        ("apps/vision/a.py", "x = 'VisionData'", False),
    ],
)
def test_a_shared_room_names_no_app(path, source, found):
    assert bool(names_of_apps(path, source)) == found


@pytest.mark.parametrize(
    "path, source",
    [
        ("core/layers.py", "from .kernels import combine\nfrom .dispatch import LocalDispatcher"),
        ("core/routing/router.py", "from . import gates\nfrom ..contract import Routing\nfrom .. import kernels"),
        ("core/convert.py", "from .config import MoEConfig"),
        ("core/kernels/triton_ops/jit/gate.py", "import triton\nimport triton.language as tl\nfrom .tiles import load"),
        ("core/kernels/triton_ops/launch.py", "def load():\n    from .jit import gate\n    import triton"),
        ("core/kernels/__init__.py", "from . import triton_ops"),
        ("core/contract/tape.py", "import math, torch\nfrom torch.nn import functional"),
        (
            "apps/vision/module.py",
            "import core\nimport torchvision\nfrom apps.train.step.module import SparseModule\nfrom .model import V",
        ),
        ("apps/multimodal/model.py", "from apps.vision.model import VMoE\nfrom apps.nlp import decode"),
        ("apps/demo.py", "from apps.vision.data import VisionData"),
        ("moesaic/commands.py", "import core\nfrom apps import load\nfrom apps.cli.train import SparseCLI"),
        ("moesaic/tables.py", "from apps.recsys.own_table import config_for"),
        ("moesaic/__init__.py", "import sys\ndef f():\n    import core"),
    ],
)
def test_allowed(path, source):
    assert violations(path, source) == []


@pytest.mark.parametrize(
    "path, source, reason",
    [
        ("core/kernels/eager.py", "from ..contract import Routing", "core.kernels may not use core.contract"),
        ("core/experts/ffn.py", "from ..kernels.eager import combine", "core.experts uses the functions of"),
        ("core/layers/moe.py", "from ..kernels import grouped", "core.layers uses the functions of core.kernels"),
        ("core/experts.py", "from .dispatch import LocalDispatcher", "core.experts may not use core.dispatch"),
        ("core/routing/gates.py", "def f():\n    from core.layers import MoE", "core.routing may not use core.layers"),
        ("core/layers.py", "from .config import MoEConfig", "core.layers may not use core.config"),
        ("core/layers.py", "from core import MoEConfig", "may not use the package core"),
        ("core/layers.py", "from . import config", "core.layers may not use core.config"),
        ("core/layers.py", "import apps.train.step.module", "core imports torch and the standard library"),
        ("core/layers.py", "if TYPE_CHECKING:\n    import lightning", "core imports torch and the standard library"),
        ("core/experts.py", "from torchvision.ops import MLP", "core imports torch and the standard library"),
        ("core/experts.py", "import importlib\nimportlib.import_module('numpy')", "core imports torch"),
        (
            "core/kernels/cpu/experts.py",
            "def f():\n    import triton",
            "triton is imported in core.kernels.triton_ops alone",
        ),
        ("core/kernels/triton_ops/gate.py", "import triton", "triton is imported inside a function"),
        ("core/kernels/triton_ops/gate.py", "from .jit import gate", "inside a function, since triton may be missing"),
        ("core/brand_new.py", "from .contract import Rows", "no place in the import order"),
        ("apps/recsys/tables/model.py", "from apps.vision.model import VMoE", "apps.recsys may not use apps.vision"),
        ("apps/vision/data.py", "from ..multimodal import data", "apps.vision may not use apps.multimodal"),
        ("apps/train/step/module.py", "from ...vision.data import VisionData", "apps.train may not use apps.vision"),
        ("apps/nets/layers.py", "from apps.train import cost", "apps.nets may not use apps.train"),
        ("apps/multimodal/model.py", "from apps.nlp.translation.module import T", "an app never imports another"),
        ("apps/vision/data.py", "from apps.cli import main", "apps.vision may not use apps.cli"),
        ("apps/cli/__init__.py", "def f():\n    import moesaic", "nothing imports moesaic"),
        ("moesaic/__init__.py", "import core", "imports nothing but the standard library"),
        ("moesaic/commands.py", "from apps.vision.module import V", "moesaic may not use apps.vision"),
        ("apps/brand_new/a.py", "from apps.base import files", "no place in the import order"),
    ],
)
def test_refused(path, source, reason):
    (line,) = violations(path, source)
    assert reason in line
    assert line.startswith(f"{path}:{len(source.splitlines())}: ")
