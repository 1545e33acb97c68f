"""``moesaic demo``: what a user may get wrong is one line, and without data a page has no examples."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import threading

import pytest
import torch
from commands import fails
from converted import DIGITS, MOE, classifier, write_run
from shown_runs import digits_run, shown

from apps import registry
from apps.cli import main
from apps.data import datasets
from apps.data.cache import DataError
from apps.demonstrate import options as library
from apps.demonstrate.command import exhibit_of, with_examples
from apps.demonstrate.drawing import draw_parts
from apps.demonstrate.page import _component, _growing
from apps.report.exhibit import Answer, Exhibit, ItemsField, NumberField, Said, TextField
from apps.train.checkpoint.loading import load
from apps.train.checkpoint.paths import find_checkpoint

needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs gradio")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return digits_run(tmp_path_factory.mktemp("digits"))


def test_wrong_options_and_a_run_that_is_none(digits, tmp_path, capsys):
    assert main(["demo", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(option in out for option in ("--ckpt_path RUN", "--port N", "--open", "--examples N"))
    half = tmp_path / "half"
    (half / "checkpoints").mkdir(parents=True)
    for code, words, line in (
        (1, ("--ckpt_path", str(tmp_path / "none")), f"no checkpoint {tmp_path}/none"),
        (1, ("--ckpt_path", str(half)), f"{half} holds no checkpoint"),
        (2, (), "the following arguments are required: --ckpt_path"),
        (2, ("--share",), "the following arguments are required"),
        (1, ("--ckpt_path", "x", "--examples", "-1"), "examples=-1 must not be negative"),
        (1, ("--ckpt_path", str(digits), "--port", "70000"), "port=70000 must be 0 to 65535"),
    ):
        assert fails(capsys, code, "demo", *words).startswith(line)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = fails(capsys, 1, "demo", "--ckpt_path", str(digits), "--port", str(port))
        assert line == f"port={port} cannot be used (Address already in use): give another --port, or 0 for any"


@needs_gradio
def test_a_number_is_typed_and_items_are_chosen_by_their_names():
    number = _component(NumberField("age"), "33")
    assert (number.get_block_name(), number.label, number.value, number.max_lines) == ("textbox", "age", "33", 1)
    items = _component(ItemsField("History", ("Alien", "Brazil"), ("7", "9"), most=2), ["Alien"])
    assert (items.get_block_name(), items.multiselect, items.value) == ("dropdown", True, ["Alien"])
    assert [name for name, _ in items.choices] == ["Alien", "Brazil"]


@needs_gradio
def test_a_damaged_checkpoint_and_a_model_that_knows_no_classes(digits, tmp_path, capsys):
    cut, run = tmp_path / "best.ckpt", tmp_path / "run"
    cut.write_bytes((digits / "checkpoints" / "best.ckpt").read_bytes()[:1000])
    line = fails(capsys, 1, "demo", "--ckpt_path", str(cut), "--port", "0")
    assert line == f"{cut} is not a readable checkpoint: damaged, cut short, or of another program"
    write_run(run, classifier(MOE), DIGITS)  # without the encoding that a training saves
    line = fails(capsys, 1, "demo", "--ckpt_path", str(run), "--port", "0")
    assert line.startswith("this model does not know its classes")


def test_without_gradio(digits, capsys, monkeypatch):
    monkeypatch.setattr(library, "LIBRARIES", ("gradio_that_is_missing",))
    line = fails(capsys, 1, "demo", "--ckpt_path", str(digits), "--port", "0")
    assert line == (
        "moesaic demo needs gradio_that_is_missing, which is not installed: "
        'pip install -e ".[demo]" in the source tree of moesaic'
    )


def test_every_app_has_a_page_and_other_models_have_none():
    for name in registry.MODELS:
        assert callable(exhibit_of(registry.resolve(name).__new__(registry.resolve(name))))
    no_demo = r"^there is no demo of torch.nn.modules.linear.Linear: there is of VisionClassifier, "
    with pytest.raises(ValueError, match=no_demo):
        exhibit_of(torch.nn.Linear(1, 1))


def test_examples_come_from_the_run_and_fetch_nothing(digits, tmp_path, monkeypatch):
    _, exhibit = shown(digits, most=4)
    assert len(exhibit.examples) == len({example.label for example in exhibit.examples}) == 4
    checkpoint = find_checkpoint(digits)
    model = load(checkpoint)
    alone = tmp_path / "alone.ckpt"
    shutil.copy(checkpoint, alone)
    exhibit, note = with_examples(exhibit_of(model), model, alone, 4)
    assert exhibit.examples == ()
    assert note.startswith("no config.yaml lies beside")
    monkeypatch.setattr(datasets, "_local", lambda dataset, cache: None)
    monkeypatch.setattr(datasets, "_fetch", lambda dataset, cache: pytest.fail("fetched"))
    exhibit, note = with_examples(exhibit_of(model), model, checkpoint, 4)
    assert exhibit.examples == ()
    assert note == "the dataset digits is not on this machine"
    with datasets.without_fetching(), pytest.raises(DataError, match="not on this machine"):
        datasets.prepare("digits")


def test_a_configuration_that_names_other_classes_makes_nothing(digits, tmp_path):
    run = shutil.copytree(digits, tmp_path / "run")
    config = (run / "config.yaml").read_text().replace("class_path: VisionData", "class_path: os.system")
    (run / "config.yaml").write_text(config)
    model = load(run)
    _, note = with_examples(exhibit_of(model), model, find_checkpoint(run), 4)
    assert "data='os.system' is neither a class of the apps nor one that is imported" in note


def test_a_dense_model_says_so_and_a_fault_of_ours_is_a_line_on_the_page_and_a_traceback_in_the_log(caplog):
    for answer, said in ((lambda values: Answer(()), "dense"), (lambda values: {}["missing"], "KeyError")):
        ((html, layers),) = _growing(Exhibit("", "", (TextField("Text"),), answer), ["a"])
        assert layers == {}
        assert said in html
    assert "Traceback" not in html
    assert caplog.records[0].exc_info[0] is KeyError


def test_the_page_shows_an_answer_as_it_grows_and_ends_it_when_it_is_left():
    go, stopped = threading.Event(), threading.Event()

    def answer(values, tell):
        try:
            for end in (1, 2, 3):
                tell(Said("Text", values[0][:end]))
                go.wait(10)
        except ValueError:
            stopped.set()
            raise
        return Answer((Said("Text", values[0]),))

    exhibit = Exhibit("", "", (TextField("Text"),), answer, grows=True)
    left = _growing(exhibit, ["abcd"])
    assert draw_parts((Said("Text", "a"),)) in next(left)[0]
    left.close()
    go.set()
    assert stopped.wait(10)
    *growing, (html, by_layer) = _growing(exhibit, ["abcd"])
    for text, (own, layers) in zip(("a", "ab", "abc"), growing, strict=True):
        assert draw_parts((Said("Text", text),)) in own
        assert layers is None
    assert draw_parts((Said("Text", "abcd"),)) in html
    assert by_layer == {}
