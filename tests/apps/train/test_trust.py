"""A loaded file is data: a checkpoint and the configuration beside it import nothing."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from commands import fails
from tiny_app import CONFIG, TinyModule
from tiny_runs import copy_run
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

import apps
import core
from apps.cli import main
from apps.cli.train import build
from apps.nlp.translation.module import Translator
from apps.train.checkpoint import sharded
from apps.train.checkpoint.loading import check_beside
from apps.vision.data import VisionData
from apps.vision.module import VisionClassifier
from core import registry
from core.config.plain import arguments_from_plain


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    copy_run(tmp_path_factory, folder, str(folder / "run"))
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder that Python imports from, with a module that leaves a file behind when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "planted.py").write_text(
        "from pathlib import Path\nfrom dataclasses import dataclass\nimport core\n"
        "Path('ran').touch()\n"
        "@dataclass(frozen=True)\nclass Router(core.TokenChoice):\n    pass\n"
        "class Module:\n    pass\n"
    )
    with monkeypatch.context() as patch:
        # A test that imports the module registers its class, which the next one must not know.
        patch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
        yield tmp_path
    sys.modules.pop("planted", None)


def tampered(trained, folder, change):
    """A copy of the checkpoint, changed by ``change``, in a run's folder of its own; no configuration beside it."""
    checkpoint = torch.load(trained / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    change(checkpoint)
    path = folder / "got" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save(checkpoint, path)
    return path


def name_router(checkpoint):
    checkpoint["hyper_parameters"]["moe"]["router"] = {"class_path": "planted.Router", "init_args": {}}


def name_router_by_text(checkpoint):
    checkpoint["hyper_parameters"]["moe"]["router"] = "planted.Router"


def name_router_by_a_file(checkpoint):
    Path("router.yaml").write_text("class_path: planted.Router\n")
    checkpoint["hyper_parameters"]["moe"] = "router.yaml"


def name_module(checkpoint):
    checkpoint["module_class"] = "planted.Module"


def name_instantiator(checkpoint):
    checkpoint["hyper_parameters"]["_instantiator"] = "planted.Module"


CHANGES = [name_router, name_router_by_text, name_router_by_a_file, name_module]


def has_run(folder: Path) -> bool:
    return (folder / "ran").exists() or "planted" in sys.modules


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_on_the_command_line_imports_nothing(trained, folder, capsys, change):
    path = tampered(trained, folder, change)
    argv = ["test", "--config", str(trained / "tiny.yaml"), "--ckpt_path", str(path)]
    assert main(argv) != 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert main(["test", "--data", "tiny_app.TinyData", "--ckpt_path", str(path)]) != 0
    assert not has_run(folder)


@pytest.mark.parametrize("change", [*CHANGES, name_instantiator])
def test_a_checkpoint_loaded_in_python_imports_nothing(trained, folder, change):
    path = tampered(trained, folder, change)
    with pytest.raises(ValueError):
        apps.load(path)
    if change not in (name_module, name_router_by_a_file):  # the caller names the class, and no parser reads files
        with pytest.raises(ValueError):
            TinyModule.load_from_checkpoint(path)
    assert not has_run(folder)


class Planted:
    """What runs code where a pickle of it is read."""

    def __reduce__(self):
        return exec, ("open('ran', 'w').close()",)


def test_a_pickle_that_wants_to_run_code_is_refused_by_name(trained, folder, capsys):
    path = tampered(trained, folder, lambda checkpoint: checkpoint.update(planted=Planted()))
    argv = ["test", "--config", str(trained / "tiny.yaml"), "--ckpt_path", str(path)]
    assert "is not a readable checkpoint: it asks for builtins.exec, which no checkpoint may" in fails(capsys, 1, *argv)
    with pytest.raises(ValueError, match=r"not a readable checkpoint: it asks for builtins.exec, which"):
        apps.load(path)
    assert not (folder / "ran").exists()


def test_all_tensors_that_differ_are_named(trained, folder, capsys):
    def rename(checkpoint):
        state = checkpoint["state_dict"]
        state["planted"] = state.pop(next(iter(state)))
        name = next(name for name in state if state[name].ndim)
        state[name] = torch.ones(7, 7)

    names = list(torch.load(trained / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    path = tampered(trained, folder, rename)
    with pytest.raises(ValueError, match=r"does not fit a TinyModule of its arguments") as error:
        apps.load(path)
    line = fails(capsys, 1, "test", "--config", str(trained / "tiny.yaml"), "--ckpt_path", str(path))
    for message in (str(error.value), line):
        assert "is (7, 7) there and" in message
        assert f"the checkpoint lacks {names[0]}; the model lacks planted" in message


def test_a_class_that_is_imported_and_registered_is_made(trained, folder):
    path = tampered(trained, folder, name_router)
    import planted  # the script names it

    moe = apps.load(path).net[3]
    assert isinstance(moe, core.MoE)
    assert (folder / "ran").exists()
    assert planted.Router.__module__ == "planted"


def test_a_class_that_the_users_own_configuration_names_is_made(trained, folder, capsys):
    path = tampered(trained, folder, name_router)
    config = yaml.safe_load(CONFIG)
    config["model"]["init_args"]["moe"]["router"] = {"class_path": "planted.Router", "init_args": {"top_k": 2}}
    Path("own.yaml").write_text(yaml.safe_dump(config))
    assert main(["test", "--config", "own.yaml", "--ckpt_path", str(path)]) == 0, capsys.readouterr().err
    assert (folder / "ran").exists()


@pytest.mark.parametrize(
    "section, key",
    [
        ("model", {"class_path": "planted.Module"}),
        ("model", "planted.Module"),
        ("data", {"class_path": "planted.Module"}),
        ("data", "other.yaml"),
        ("data", {"class_path": "tiny_app.TinyData", "init_args": {}, "dict_kwargs": {"n": 1}}),
        ("trainer", "other.yaml"),
        ("compile", "other.yaml"),
        ("compile", {"class_path": "planted.Module"}),
        ("config", "other.yaml"),
        ("trainer.callbacks", [{"class_path": "planted.Module"}]),
    ],
)
def test_a_configuration_beside_a_checkpoint_names_registered_classes_only(trained, folder, capsys, section, key):
    (folder / "other.yaml").write_text("class_path: planted.Module\n")
    path = tampered(trained, folder, lambda checkpoint: None)
    beside = path.parent.parent / "config.yaml"
    beside.write_text(yaml.safe_dump({**yaml.safe_load(CONFIG), section: key}))
    assert main(["test", "--ckpt_path", str(path)]) == 1
    error = capsys.readouterr().err
    assert "config.yaml lies beside the checkpoint" in error
    assert "--config" in error
    assert not has_run(folder)


# Texts that the parser would take for a class of Lightning's, or of the folder's, with what is written to or called.
PLANTED = r'{"class_path": "planted\u002eModule"}'
PROFILER = (
    r'{"class_path": "lightning\u002epytorch\u002eprofilers\u002eSimpleProfiler", "init_args": {"dirpath": "ran"}}'
)
LAMBDA = (
    r'[{"class_path": "lightning\u002epytorch\u002ecallbacks\u002eLambdaCallback", '
    r'"init_args": {"setup": "planted\u002eModule"}}]'
)
BEST = {"class_path": "BestAndLast", "init_args": {"monitor": PLANTED}}
LOGGER = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "ran"}}
UNTRUSTED = {
    "callbacks": [LAMBDA, f"[{PLANTED}]", "[other]", [BEST]],
    "callbacks+": [{"class_path": "planted.Module"}],
    "logger": [LOGGER, PLANTED],
    "profiler": [PROFILER],
    "plugins": [["planted.Module"]],
    "strategy": [PLANTED, "class_path:\n  planted.Module", "other"],
    "strategy.class_path": ["planted.Module"],
    "accelerator": [{"class_path": "planted.Module"}],
    "devices": [["{class_path: planted.Module}"]],
    "default_root_dir": ["ran"],
}
DEVICES = ("strategy", "accelerator", "devices")  # a test chooses its own device, whatever the file says


def test_parts_of_the_trainer_and_optimizers_beside_a_checkpoint_are_left_out_by_name(trained, folder, capsys):
    (folder / "other").write_text("class_path: planted.Module\n")
    path = tampered(trained, folder, lambda checkpoint: None)
    config = yaml.safe_load(CONFIG)
    for option, value in ((option, value) for option, values in UNTRUSTED.items() for value in values):
        kept, left_out = check_beside({**config, "trainer": {"precision": "64-true", option: value}}, path)
        assert (kept["trainer"], left_out) == ({"precision": "64-true"}, [f"trainer.{option}"])
    config["trainer"] |= {option: values[0] for option, values in UNTRUSTED.items()}
    config |= {section: {"class_path": "planted.Module"} for section in ("optimizer", "lr_scheduler")}
    (path.parent.parent / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["test", "--ckpt_path", str(path)]) == 0
    names = capsys.readouterr().err.partition("; left out: ")[2].partition(" (--config")[0].split(", ")
    assert {*names} >= {f"trainer.{option}" for option in UNTRUSTED if option not in DEVICES}
    assert not {*names} & {f"trainer.{option}" for option in DEVICES}
    assert not has_run(folder)


def test_plain_values_of_the_trainer_beside_a_checkpoint_hold(trained, folder, capsys):
    path = tampered(trained, folder, lambda checkpoint: None)
    config = yaml.safe_load(CONFIG)
    config["trainer"] |= {"strategy": "auto", "precision": "64-true", "limit_test_batches": 2, "logger": False}
    (path.parent.parent / "config.yaml").write_text(yaml.safe_dump(config))
    cli = build("test", ["--ckpt_path", str(path)])
    assert (cli.trainer.precision, cli.trainer.limit_test_batches) == ("64-true", 2)
    assert "left out" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, value",
    [
        ("start", "planted.Router"),
        ("start", "other"),
        ("start", PLANTED.replace("Module", "Router")),
        ("note", PLANTED),
        ("note", "class_path: planted.Module"),
        ("note", [{"deep": PLANTED}]),
        ("starts", {"planted.Router"}),
        ("weights", "planted.Router"),
        ("moe.router", "planted.Router"),
        ("moe+", "planted.Router"),
        ("other", PLANTED),
    ],
)
def test_a_text_that_the_parser_takes_for_a_class_is_rejected(trained, folder, capsys, name, value):
    (folder / "other").write_text("class_path: planted.Router\n")
    path = tampered(trained, folder, lambda checkpoint: checkpoint["hyper_parameters"].update({name: value}))
    config = yaml.safe_load(CONFIG)
    config["model"] = {"class_path": "tiny_app.LooseModule"}
    config["data"] = {"class_path": "tiny_app.TinyData"}
    Path("own.yaml").write_text(yaml.safe_dump(config))
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, "module_class": "tiny_app.LooseModule"}, path)
    assert main(["test", "--config", "own.yaml", "--ckpt_path", str(path)]) != 0
    assert name in capsys.readouterr().err
    assert not has_run(folder)
    section = {"class_path": "tiny_app.LooseModule", "init_args": {**checkpoint["hyper_parameters"]}}
    with pytest.raises(ValueError, match="lies beside the checkpoint"):
        check_beside({"model": section}, path)


def test_a_text_that_names_no_class_is_taken(trained, folder):
    given = {"start": "copy", "note": "val/loss, of 0.5"}
    path = tampered(trained, folder, lambda checkpoint: checkpoint["hyper_parameters"].update(given))
    Path("own.yaml").write_text("data: tiny_app.TinyData\nmodel: tiny_app.LooseModule\n")
    torch.save({**torch.load(path, weights_only=True), "module_class": "tiny_app.LooseModule"}, path)
    build("test", ["--config", "own.yaml", "--ckpt_path", str(path)])
    assert not has_run(folder)


def test_every_run_of_the_apps_may_be_adopted():
    # A text in a config's place would be a class or a file to the parser; in other places it is a text.
    check_beside({"model": {"class_path": "apps.vision.module.VisionClassifier", "init_args": {}}}, Path("x"))
    arguments_from_plain(VisionData, {"dataset": "digits", "root": "some.folder", "mean": [0.5]}, "data")
    arguments_from_plain(VisionClassifier, {"moe_blocks": "last2", "vit": {"depth": 4}, "pretrained": "a.b"}, "model")
    with pytest.raises(ValueError, match=r"model\.vit='planted\.yaml' is a text in place of a ViTConfig"):
        arguments_from_plain(VisionClassifier, {"vit": "planted.yaml"}, "model")
    with pytest.raises(ValueError, match=r"model\.moe\.router has no class_path"):
        arguments_from_plain(VisionClassifier, {"moe": {"num_experts": 4, "router": {"top_k": 2}}}, "model")
    with pytest.raises(ValueError, match=r"model\.decode='x\.yaml' is a text"):
        arguments_from_plain(Translator, {"decode": "x.yaml"}, "model")


def test_a_config_of_a_module_must_be_registered(tmp_path):
    from dataclasses import make_dataclass

    kind = make_dataclass("Strange", [("width", int)], frozen=True)
    with pytest.raises(ValueError, match=r"no checkpoint can be loaded with a .*Strange: decorate the class"):
        TinyModule(3, moe=kind(3))


# ---- shards


def shards(folder):
    """A sharded checkpoint of one tensor, by hand."""
    path = folder / "last.ckpt"
    name = "shards-0-0123abcd"
    dcp.save({"weight/w": torch.arange(4.0)}, storage_writer=dcp.FileSystemWriter(path / name), no_dist=True)
    torch.save({"state_dict": {}, "sharded": {"folder": name, "world_size": 1}}, path / "checkpoint.pt")
    return path, path / name / ".metadata"


@pytest.mark.parametrize("module", [b"pathlib", b"pathlib._local"])
def test_shards_that_any_version_of_python_wrote_are_read(tmp_path, module):
    path, table = shards(tmp_path)
    assert sharded.read(path)["state_dict"]["w"].tolist() == [0, 1, 2, 3]
    metadata = pickle.loads(table.read_bytes())
    metadata.storage_meta.checkpoint_id = "HERE"
    text = pickle.dumps(metadata, protocol=2)
    # A global by the lines of its module and name, called with a tuple of one text.
    here = b"X\x04\x00\x00\x00HERE"
    assert text.count(here) == 1
    table.write_bytes(text.replace(here, b"c" + module + b"\nPurePosixPath\n" + here + b"\x85R"))
    assert sharded.read(path)["state_dict"]["w"].tolist() == [0, 1, 2, 3]


def pickled_build(target: bytes) -> bytes:
    """Return a pickle, by hand, that pushes a global and a dict of one entry, and sets the entry on the global."""
    return b"\x80\x02" + b"c" + target + b"}" + b"X\x07\x00\x00\x00plantedK\x01" + b"sb" + b"."


def with_method() -> bytes:
    made = BytesStorageMetadata()
    made.__dict__["read_data"] = 1
    return pickle.dumps(Metadata(state_dict_metadata={"x": made}))


@pytest.mark.parametrize(
    "table",
    [
        pickled_build(b"torch.distributed.checkpoint.metadata\nMetadata\n"),
        pickled_build(b"torch.serialization\n_get_layout\n"),
        with_method(),
    ],
    ids=["a_class", "a_function", "a_foreign_attribute"],
)
def test_a_table_of_contents_sets_nothing_on_classes_and_no_foreign_attribute(tmp_path, table):
    path, file = shards(tmp_path)
    file.write_bytes(table)
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        sharded.read(path, device="meta")
    assert not hasattr(Metadata, "planted")
    assert not hasattr(torch.serialization._get_layout, "planted")


@pytest.mark.parametrize("place", ["../outside.distcp", "/tmp/outside.distcp"])
def test_shards_outside_their_folder_are_refused(tmp_path, place):
    path, table = shards(tmp_path)
    with open(table, "rb") as file:
        metadata = pickle.load(file)
    for where in metadata.storage_data.values():
        where.relative_path = place
    table.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        sharded.read(path)
    for folder in ("..", "/tmp", "../other"):
        torch.save({"state_dict": {}, "sharded": {"folder": folder, "world_size": 1}}, path / "checkpoint.pt")
        with pytest.raises(ValueError, match="not a readable checkpoint"):
            sharded.read(path)


# ---- YAML


# Ten lists of ten of the one before: 10^10 values in under 1 KB.
BOMB = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
BOMB += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n".join(BOMB), "its aliases stand for over 1,000,000 values"),
        ("a: &a [*a]\n", "an alias stands for a value that holds the alias"),
    ],
    ids=["many", "itself"],
)
def test_a_configuration_of_many_aliases_or_that_holds_itself_is_refused_at_once(tmp_path, capsys, text, message):
    (tmp_path / "bomb.yaml").write_text(text)
    assert main(["fit", "--config", str(tmp_path / "bomb.yaml")]) == 2
    assert message in capsys.readouterr().err
