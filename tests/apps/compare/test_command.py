"""``moesaic compare`` as a user calls it; what is finished is not done again."""

import dataclasses
import functools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import compare_app
import pytest
import tiny_app
import torch
from compared import asked, experiment, offers, overlay
from places import ROOT
from refusals import refused

from apps.cli import main as moesaic
from apps.compare import command, measure, training, work
from apps.equal_cost import routers


@pytest.fixture(scope="module", autouse=True)
def _read_once():
    """Commands with the same arguments share an experiment: reading them takes as long as training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "Experiment", functools.cache(command.Experiment))
        yield


def counted(monkeypatch, most=99) -> list[str]:
    """Return the names of the trainings from now on; the one after ``most`` is stopped."""
    done, real = [], training.train

    def train(*args, **kwargs):
        if len(done) == most:
            raise KeyboardInterrupt
        done.append(args[1].name)
        return real(*args, **kwargs)

    monkeypatch.setattr(work, "train", train)
    return done


def read(output):
    return json.loads((output / "results.json").read_text())


def test_compare_end_to_end_and_again(config, tmp_path, monkeypatch, capsys):
    output, names = tmp_path / "out", offers("dense_equal_flops", "dense_double_equal_flops", "centroids")
    rates = ("--learning_rates", "0.01", "0.03")
    argv = asked(config, output, "--seeds", "1", *rates, *names, "--model.further", '["top2"]')
    first = counted(monkeypatch, 3)
    assert moesaic(argv) == 130
    assert f"To continue: moesaic compare {config}" in capsys.readouterr().err
    rest = counted(monkeypatch)
    assert moesaic(argv) == 0
    # 2 rates of two systems, then a seed of three: each once, the three before the stop not again.
    assert len(first + rest) == len({*first, *rest}) == 7
    shown = capsys.readouterr()
    assert "left out: not called equal" in shown.out.replace("\n", " ")
    assert "lightning" not in shown.err.lower()
    results = read(output)
    assert (results["seeds"], results["summary"]["rows"][1]["system"]["replaced_ratio"]) == ([0], 1.0)
    assert results["machine"]["torch"] == torch.__version__
    assert (output / "quality_against_flops.png").is_file()
    page = (output / "table.md").read_text()
    assert "| test top1, % |" in page
    (line,) = (line for line in page.splitlines() if line.startswith("| test top2, % |"))
    assert line.endswith("| – |")  # the centroids know no second class
    counted(monkeypatch, 0)
    assert (moesaic(argv), read(output)) == (0, results)


def test_a_finished_comparison_takes_no_fewer_seeds_and_there_is_help(finished, capsys):
    output, argv = finished
    assert (output / "quality_against_flops.png").stat().st_size > 5000  # drawn by a fixture of the whole session
    assert moesaic([*argv, "--seeds", "1"]) == 1
    assert "options.num_seeds: 2 saved, 1 now" in capsys.readouterr().err
    assert moesaic(["compare", "--help"]) == 0
    assert "--learning_rates" in capsys.readouterr().out


def test_a_finished_comparison_takes_more_seeds_and_systems(config, whole, tmp_path, monkeypatch):
    trained, measured = counted(monkeypatch), []

    def measure_none(jobs, *_):
        measured.append(list(jobs))
        return {name: {"seconds_per_step": 1.0} for name in jobs}

    monkeypatch.setattr(work, "measure", measure_none)

    def compared(seeds, *more):
        argv = asked(config, tmp_path / "grown", "--seeds", str(seeds), "--rounds", "5", *more)
        assert moesaic([*argv, "--baselines", "dense_equal_flops"]) == 0
        return read(tmp_path / "grown")

    first = compared(1)
    assert len(trained) == 2
    grown = compared(2, "--routers", overlay(tmp_path / "switch.yaml", top_k=1))
    assert len(trained) == len(set(trained)) == 6  # 3 systems with 2 seeds
    # Side by side: those of the first time once more.
    assert measured == [["sparse", "dense_equal_flops"], ["sparse", "dense_equal_flops", "router_switch"]]
    assert grown["date"] != first["date"]
    assert (grown["seeds"], grown["finals"]["sparse"][0]) == ([0, 1], first["finals"]["sparse"][0])
    for name in ("sparse", "dense_equal_flops"):
        assert [u["test"] for u in grown["finals"][name]] == [u["test"] for u in read(whole)["finals"][name]]


@pytest.mark.parametrize("jobs", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_termination_is_no_success_and_says_how_to_go_on(config, tmp_path, monkeypatch, capsys, jobs):
    """The trainer gets the signal where there is one job; with two, the wait for the workers does."""
    argv = ["compare", str(config), "--output", str(tmp_path / "out"), "--rounds", "0", "--jobs", jobs]

    def terminated(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(work.Work, "show", terminated)
    assert moesaic(argv) == 143
    assert f"terminated; what is finished is kept. To continue: moesaic {' '.join(argv)}" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert not multiprocessing.active_children()


# In a baseline without steps, and after the last batch of a test.
@pytest.mark.parametrize("kind, hook, done", [
    (compare_app.Centroids, "fit", ["sparse"]), (compare_app.TinyModel, "on_test_epoch_end", []),
])  # fmt: skip
def test_a_termination_outside_lightnings_loops_is_one_too(config, tmp_path, monkeypatch, capsys, kind, hook, done):
    real = getattr(kind, hook)

    def terminated(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(kind, hook, terminated)
    assert moesaic(asked(config, tmp_path / "out", "--seeds", "1", *offers("centroids"))) == 143
    assert "terminated; what is finished is kept. To continue: moesaic compare" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert [path.parts[-3] for path in (tmp_path / "out").glob("units/*/*/result.json")] == done
    assert not list((tmp_path / "out").rglob("*.tmp"))


@pytest.mark.slow
def test_systems_may_be_left_out_and_come_back_without_measuring_again(finished, monkeypatch, capsys):
    (output, argv), asked_for = finished, []
    shutil.rmtree(output / "units" / "centroids")  # as if it was not done yet
    # The slow one is dropped before it is finished, and then a finished one.
    assert moesaic([*argv, "--baselines", "dense_equal_flops"]) == 0
    assert "not asked for" not in capsys.readouterr().out
    assert moesaic([*argv, "--baselines", "centroids"]) == 0
    note = "not asked for this time: dense, equal FLOPs. The finished runs are kept, and shown again when asked for"
    assert note in capsys.readouterr().out
    shown = read(output)
    assert list(shown["finals"]) == ["sparse", "centroids"]
    assert "| dense, equal FLOPs" not in (output / "table.md").read_text()
    counted(monkeypatch, 0)
    assert moesaic([*argv, "--baselines", "dense_equal_flops", "centroids"]) == 0
    assert list(read(output)["finals"]) == ["sparse", "dense_equal_flops", "centroids"]
    assert read(output)["date"] == shown["date"]  # that of the work, not of the printing

    def measured(jobs, rounds, *_):
        asked_for.append((rounds, list(jobs)))
        rates = {"seconds_per_step": 0.1, "train_examples_per_second": 321.0, "train_rounds": [1.0] * rounds}
        return dict.fromkeys(jobs, rates)

    def table(rounds, *baselines):
        assert moesaic([*argv, "--rounds", rounds, "--baselines", *baselines]) == 0
        return (output / "table.md").read_text()

    monkeypatch.setattr(work, "measure", measured)
    for rounds in ("2", "0", "2"):
        assert "| training, examples/s | 321 | 321 | – |" in table(rounds, "dense_equal_flops", "centroids")
    assert "| training, examples/s | 321 | – |\n" in table("0", "centroids")
    table("3", "dense_equal_flops", "centroids")
    assert asked_for == [(rounds, ["sparse", "dense_equal_flops"]) for rounds in (2, 3)]


@pytest.mark.slow
def test_an_estimators_settings_are_searched_once_and_for_a_time(finished, monkeypatch):
    output, argv = finished
    argv += ["--baselines", "tuned_centroids"]
    real, fits = compare_app.TunedCentroids.fit, []

    def counted(self, data, seed, settings):
        fits.append((seed, settings["share"]))
        if interrupt and len(fits) == 2:
            raise KeyboardInterrupt
        real(self, data, seed, settings)

    monkeypatch.setattr(compare_app.TunedCentroids, "fit", counted)
    interrupt = True
    assert moesaic(argv) == 130  # in the second setting
    interrupt = False
    assert moesaic(argv) == 0
    # The search of seed 1000 goes on where it was, and its choice serves both seeds.
    assert [seed for seed, _ in fits] == [1000, 1000, 1000, 1000, 0, 1]
    assert [share for _, share in fits[:4]] == [0.0, 0.5, 0.5, 1.0]
    best = json.loads((output / "units/tuned_centroids/search-1min-seed1000/result.json").read_text())["settings"]
    assert {share for _, share in fits[4:]} == {best["share"]}
    assert not list(output.rglob("tried.json"))
    page = (output / "table.md").read_text()
    assert re.search(r"means drawn together; tuned for [\d.]+ s, 3 of 3 settings\.", page)
    assert "| settings tried | – | 3 of 3 |" in page
    # Another budget is another search; more minutes go on from fewer ones.
    del fits[:]
    assert (moesaic([*argv, "--baseline_minutes", "1e-9"]), [seed for seed, _ in fits]) == (0, [1000, 0, 1])
    ended = r"s, 1 of 3 settings \(--baseline_minutes 1e-09 ended the search; the best of these is taken\)"
    assert re.search(rf"tuned for [\d.]+ {ended}", (output / "table.md").read_text())
    del fits[:]
    assert (moesaic([*argv, "--baseline_minutes", "5"]), [seed for seed, _ in fits]) == (0, [0, 1])


def test_the_examples_of_two_tests_are_compared_seed_by_seed(finished, capsys):
    output, argv = finished
    assert moesaic([*argv, "--baselines", "dense_equal_flops", "centroids"]) == 0
    results = read(output)
    page, pairs = (output / "table.md").read_text(), results["summary"]["examples"]
    assert [(p["system"], p["seed"]) for p in pairs] == [("dense_equal_flops", 0), ("dense_equal_flops", 1)]
    for seed, pair in enumerate(pairs):  # of 48 points
        finals = [results["finals"][name][seed] for name in ("sparse", "dense_equal_flops")]
        by_metric = [final["test"]["test/top1"] for final in finals]
        difference = pair["differences"][0]["difference"]
        assert difference == pytest.approx(48 * (by_metric[0] - by_metric[1]))
        interval = f"95 % interval over the test examples {difference - 1:+.2f} to {difference + 1:+.2f}"
        line = f"Against dense, equal FLOPs, seed {seed}: right points difference {difference:+.2f}, {interval}"
        assert f"{line}, p = 0.500: not significant over these test examples (counted)." in page
    # The page alone has parts of the examples.
    assert "p = 0.010: significant over these test examples" in page
    shown = " ".join(capsys.readouterr().out.split())
    assert "Two kinds of interval" not in shown
    assert shown.endswith(f"report: {output / 'report.html'}")
    report = (output / "report.html").read_text()
    assert report.index("Two kinds of interval") < report.index("right points difference")
    assert results["signatures"] == {"top1": "micro"}
    assert "- top1: micro." in page


def test_baselines_start_from_the_generators_state_alone_beside_any_folder(config, tmp_path, monkeypatch):
    tried, heads = experiment(config), []
    for system in ("sparse", "dense_equal_flops", "dense_equal_flops"):
        torch.manual_seed(3)
        heads.append(tried.module(system).embed.weight)
    assert torch.equal(heads[0], heads[1])  # drawn first, in both
    assert torch.equal(heads[1], heads[2])
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / config.stem
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    assert experiment(config).rate == 0.01


@pytest.mark.slow
def test_workers_train_and_measure(config, whole, tmp_path):
    outcome = command.run_command(asked(config, tmp_path / "out", "--rounds", "1", "--jobs", "2")[1:])
    alone = read(whole)["summary"]["rows"]
    assert [dataclasses.asdict(r.test) for r in outcome.summary.rows] == [row["test"] for row in alone[:2]]
    assert outcome.summary.clock == "steps"
    for row in outcome.summary.rows:
        assert row.speed["train_examples_per_second"] > 0
        assert row.speed["inference_examples_per_second"] > 0
        assert row.speed["peak_memory_bytes"] > row.speed["base_memory_bytes"] > 0
        assert row.speed["cost"]["replaced_flops_per_example"] == 4 * 576


def test_a_round_takes_all_batches_where_they_hold_different_numbers_of_examples(monkeypatch):
    seconds = iter([5.0, 7.0])
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    bench = object.__new__(measure._Bench)
    bench.device = torch.device("cpu")
    sizes = iter([1, 2, 3, 10, 20, 30])
    assert bench._round(lambda: next(sizes), 3) == (1 + 2 + 3) / (7 - 5)
    assert next(sizes) == 10, "one round: three steps"


def test_a_workers_error_is_the_commands(config, tmp_path):
    argv = asked(config, tmp_path / "out", "--learning_rates", "1", "--jobs", "2", "--model.explodes_from", "0.5")
    with pytest.raises(RuntimeError, match="the training loss is nan"):
        command.run_command(argv[1:])


@pytest.mark.parametrize("argv, message", [
    (["extra"], "unexpected argument 'extra'"),
    (["--jobs", "0"], "--jobs 0 must be at least 1"),
    (["--baselines", "boosted"], "baseline 'boosted' is unknown: the module has dense_equal_flops"),
    (["--trainer.max_epoch", "3"], "did you mean 'max_epochs'"),
    (["--model.moe.num_experts", "1"], "top_k=2 exceeds num_experts=1"),
    (["--trainer.fast_dev_run", "true"], "a comparison needs whole runs"),
    (["--model.grow.checkpoint", "runs/few"], "model.grow: a comparison trains all models from scratch"),
    (["--model.distil.teacher", "runs/large"], "model.distil: a comparison trains all models on the labels alone"),
])  # fmt: skip
def test_bad_input_is_one_line(config, tmp_path, capsys, argv, message):
    assert moesaic(["compare", str(config), "--output", str(tmp_path / "o"), *argv]) in (1, 2)
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_a_module_that_tells_a_comparison_nothing_is_refused(tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(tiny_app.CONFIG)
    assert moesaic(asked(tmp_path / "tiny.yaml", tmp_path / "out")) == 2
    assert "has no COMPARISON beside its class, which says its baselines" in capsys.readouterr().err


def test_the_report_of_the_sparse_models_test_is_part_of_the_page(tmp_path):
    few = [
        "--trainer.limit_train_batches",
        "2",
        "--trainer.limit_test_batches",
        "1",
        "--baselines",
        "dense_equal_params",
    ]
    output = tmp_path / "digits"
    assert moesaic(asked(ROOT / "configs/vision/digits.yaml", output, "--seeds", "1", *few)) == 0
    assert "dense, equal parameters" in (output / "table.md").read_text()
    assert (output / "quality_against_flops.png").exists()
    assert "What the experts are used for" in (output / "report.html").read_text()


OWN_ROUTER = """
import dataclasses
import core

class Loudest(core.PairRouter):
    def choose(self, tokens):
        loudest_T1 = tokens.x_TD.abs().argmax(-1, keepdim=True) % self.num_experts
        return core.Choice(loudest_T1, gates_TK=loudest_T1.new_ones(loudest_T1.shape).to(tokens.x_TD))

@dataclasses.dataclass(frozen=True)
class LoudestConfig(core.RouterConfig):
    router_class = Loudest
    def pairs_per_token(self, num_experts):
        return 1.0
"""


@pytest.mark.slow
def test_routers_are_compared_at_equal_active_flops(config, finished, tmp_path, monkeypatch):
    """A router of the user's own that can be imported, and with ``all`` those of the folder that fit."""
    (tmp_path / "own_routers_of_a_user.py").write_text(OWN_ROUTER)
    monkeypatch.syspath_prepend(tmp_path)
    own, folder = tmp_path / "own.yaml", tmp_path / "routing"
    own.write_text("model: {init_args: {moe: {router: {class_path: own_routers_of_a_user.LoudestConfig}}}}")
    folder.mkdir()
    switch = overlay(folder / "switch.yaml", top_k=1)
    # One expert a token where the config has two: 576 = 64 + 4 * 8 * F, so F = 16 in place of 8.
    made = routers.Variant(experiment(config).module("sparse").comparison, switch).config()
    assert (made.router.top_k, made.expert.hidden_dim, made.flops_per_token(8)) == (1, 16, 576)
    overlay(folder / "too_many.yaml", top_k=5)
    overlay(folder / "task.yaml", "Task", num_tasks=2, top_k=2)
    overlay(folder / "domain.yaml", "Domain", num_domains=4)
    output, argv = finished

    def compared(*words):
        assert moesaic([*argv, *words]) == 0
        rows = read(output)["summary"]["rows"]
        return {row["system"]["name"]: row for row in rows}

    rows = compared("--jobs", "2", "--routers", switch, str(own))
    assert list(rows) == ["sparse", "router_switch", "router_own"]
    assert rows["router_own"]["routing"]["load_imbalance"] >= 1
    monkeypatch.setattr(routers, "FOLDER", folder)
    rows = compared("--routers", "all")
    assert list(rows) == ["sparse", "router_switch"]
    routing = rows["router_switch"]["routing"]
    assert (rows["router_switch"]["system"]["replaced_ratio"], routing["drop_rate"]) == (1.0, 0)
    assert 1 <= routing["load_imbalance"] <= 4
    page = (output / "table.md").read_text().partition("## Every figure")[2].partition("\n## ")[0]
    headings = [line.split(" |")[0] for line in page.splitlines() if line.startswith("| ")]
    assert headings == ["| router", "| ---", "| the config's", "| switch"]
    assert "too_many: left out: top_k=5 exceeds num_experts=4." in page
    task = "router Task (arXiv 2110.03742) needs context.task_ids_B, which TinyModel does not give."
    assert f"task: left out: {task}" in page
    domain = "Domain needs context.domain_ids_B or domain_weights_BE in training: both are None."
    assert f"domain: left out: {domain}" in page  # evaluation can do without


def test_what_is_asked_for_by_name_is_compared_or_the_command_ends(config, finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "Work", lambda *_: pytest.fail("trained"))
    nowhere, many = tmp_path / "nowhere.yaml", overlay(tmp_path / "many.yaml", top_k=5)
    nowhere.write_text("model: {init_args: {moe: {router: {class_path: no_such_file.Loudest}}}}")
    for words, message in (
        (["switch", many], "many cannot be compared: top_k=5 exceeds num_experts=4"),
        (["switch", str(nowhere)], "nowhere cannot be compared: no_such_file.Loudest: No module named 'no_such_file'"),
    ):
        capsys.readouterr()
        assert (moesaic([*finished[1], "--routers", *words]), capsys.readouterr().err) == (1, f"error: {message}\n")
    argv = asked(config, tmp_path / "o", *offers("dense_equal_flops", "dense_double_equal_flops"))
    assert moesaic([*argv, "--baselines", "dense_equal_flops", "dense_double_equal_flops"]) == 1
    assert "dense double, equal FLOPs cannot be compared: not called equal" in capsys.readouterr().err


def test_two_routers_may_not_share_a_name_and_all_of_none_are_refused(config, tmp_path, capsys, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first, second = overlay(tmp_path / "a" / "mine.yaml"), overlay(tmp_path / "b" / "mine.yaml", top_k=1)
    rule = "would both be 'mine'"
    refused(f"routers {first} and {second} {rule} in the table: rename", routers.resolve, [first, second])
    assert routers.resolve([first, str(tmp_path / "b" / ".." / "a" / "mine.yaml")]) == (first,)
    refused(rule, routers.variants, experiment(config).module("sparse").comparison, [first, second])
    monkeypatch.setattr(routers, "FOLDER", tmp_path / "none")
    for words, message in (
        ([first, second], f"routers {first} and {second} {rule} in the table: rename a file"),
        (["all"], "--routers all: no overlays in this installation"),
    ):
        assert moesaic(["compare", str(config), "--output", str(tmp_path / "o"), "--routers", *words]) == 1
        assert capsys.readouterr().err.startswith(f"error: {message}")


WRONG = {
    "no configuration nowhere.yaml": ["nowhere.yaml"],
    "no configuration tiny.yml; did you mean tiny.yaml?": ["tiny.yml"],
    "no configuration none/x.yaml: there is no folder none": ["none/x.yaml"],
    ". is a folder, not a configuration": ["."],
    "no configuration configs/debgu.yaml": ["tiny.yaml", "--overlay", "configs/debgu.yaml"],
    "router 'swich' is neither a file nor one of": ["tiny.yaml", "--routers", "swich"],
    "seeds=0 must be at least 1": ["tiny.yaml", "--seeds", "0"],
    "--config does not exist: write moesaic compare CONFIG, without an option's name": ["--config", "tiny.yaml"],
    "sedes does not exist; did you mean 'seeds'?": ["tiny.yaml", "--sedes", "1"],
    "tiny.yaml is a file, not a folder": ["tiny.yaml", "--output", "tiny.yaml"],
}


def test_what_the_command_line_tells_is_refused_before_torch_is_imported(config):
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from apps.cli import main; "
        f"codes = [main(['compare', *words]) for words in {[*WRONG.values()]!r}]; "
        "print(0 in codes, [name for name in ('torch', 'lightning') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=config.parent, capture_output=True, text=True, check=True)
    assert ran.stdout == "False []\n"
    for line, message in zip(ran.stderr.splitlines(), WRONG, strict=True):
        assert line.startswith(f"error: {message}")
