"""The report of a test: gates, experts and columns of models whose answer is known, and the files it writes."""

import csv
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from made_table import MadeTable, batch, features, rows_of
from quiet_trainer import quiet_trainer
from torch.utils.data import DataLoader

import core
from apps.recsys.binary_metrics import calibration
from apps.recsys.encoding.features import CategoricalFeature, ContinuousFeature, Features, VectorFeature
from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.kinds import Outputs
from apps.recsys.metrics import MultiTaskMetrics
from apps.recsys.tables.encode import checks
from apps.recsys.tables.module import MultiTaskRecommender
from apps.recsys.tables.report import gating
from apps.recsys.tables.report.gating import Gate, GateReader, dependence, expert_use
from apps.recsys.tables.report.importance import columns_of, shuffled, shuffled_importances
from apps.recsys.tables.report.report import (
    RecommenderReport,
    RecommenderReportConfig,
    calibration_chart,
    polarization,
    write_parts,
)
from apps.recsys.tables.rows.arrays import join
from apps.recsys.tables.rows.batch import TableBatch
from apps.report.page import load_sections

MLP = core.MLP((4,))
PICTURES = ("calibration", "gates_by_task", "gates_by_value", "utilization", "polarization")


def recommender(shared: object, **options: object) -> MultiTaskRecommender:
    seed_everything(0, verbose=False)
    return MultiTaskRecommender(features(), shared=shared, **options).eval()  # type: ignore[arg-type]


def read(module: MultiTaskRecommender, *batches) -> GateReader:
    reader = GateReader(module)
    for b in batches:
        with reader.reading():
            module(b)
    return reader


def test_gates_are_read_over_batches_and_have_their_names():
    module = recommender(core.MMoE(3, MLP))
    first, second = batch(6), batch(5, seed=1)
    gates = read(module, first, second).gates()
    assert [(g.block, g.end, g.task) for g in gates] == [("", "task0", 0), ("", "task1", 1)]
    assert gates[0].experts == ("shared0", "shared1", "shared2")
    with core.record(module) as tape, torch.no_grad():
        module(first)
    np.testing.assert_allclose(gates[1].weights_NE[:6], tape.entries[1].routing.gates_BtE[:, 1].numpy())
    np.testing.assert_allclose(gates[1].weights_NE.sum(1), np.ones(11), atol=1e-6)
    reader = read(recommender(core.HoME(1, MLP, categories=(0, 1))), batch())
    gates = reader.gates()
    assert [g.name for g in gates] == [
        "level 0: category 0", "level 0: category 1", "level 0: shared representation", "level 1: click",
        "level 1: buy",
    ]  # fmt: skip
    assert gates[4].expert_labels == ("shared 0", "category 1 0", "buy 0")
    zeros = reader.zero_share()
    assert list(zeros["level 0"]) == ["shared0", "category0.0", "category-self0.0", "category1.0", "category-self1.0"]
    assert list(zeros["level 1"]) == [
        *("shared0", "category0.0", "task0.0", "self0.0"),
        *("category1.0", "task1.0", "self1.0"),
    ]
    module = MultiTaskRecommender(features(num_domains=3), shared=core.STAR(expert=MLP)).eval()
    (gate,) = (reader := read(module, batch(num_domains=3))).gates()
    assert (gate.label, gate.expert_labels) == ("all tasks", ("domain 0", "domain 1", "domain 2"))
    assert (gate.entropy, list(reader.zero_share()[""])) == (0, ["domain0", "domain1", "domain2"])
    gates = read(recommender(core.PLE(2, MLP, num_task_experts=1)), batch()).gates()
    assert [(g.block, g.label) for g in gates] == [
        ("level 0", "click"),
        ("level 0", "buy"),
        ("level 0", "shared representation"),
        ("level 1", "click"),
        ("level 1", "buy"),
    ]
    assert gates[2].experts == ("shared0", "shared1", "task0.0", "task1.0")
    assert gates[2].expert_labels == ("shared 0", "shared 1", "click 0", "buy 0")
    gates = read(recommender(core.OMoE(2, MLP), num_members=2), batch()).gates()
    assert [g.name for g in gates] == ["members 0: all tasks", "members 1: all tasks"]
    names = [gating.expert_label(n, ("click", "buy")) for n in ("shared3", "task1.0", "self0.1", "domain.0", "17")]
    assert names == ["shared 3", "buy 0", "click self 1", "domain 0", "17"]


@pytest.mark.parametrize(
    "shared, names",
    [(core.MMoE(3, MLP), ["shared0", "shared1", "shared2"]),
     (core.CGC(2, MLP, num_task_experts=1), ["shared0", "shared1", "task0.0", "task1.0"]),
     (core.CGC(1, MLP, num_task_experts=1, self_gate=1), ["shared0", "task0.0", "self0.0", "task1.0", "self1.0"]),
     (core.CGC(1, MLP, num_task_experts=(0, 2)), ["shared0", "task1.0", "task1.1"]),
     (core.MMoE(3, MLP, router=core.TokenChoice(top_k=3)), ["0", "1", "2"]),
     (core.MMoE(3, MLP, router=core.TokenChoice(top_k=3), selection="shared"), ["shared0", "shared1", "shared2"])],
    ids=["mmoe", "cgc", "self_gate", "uneven", "sparse", "selected"],
)  # fmt: skip
def test_a_dead_expert_is_found_whichever_it_is(shared, names):
    for dead, name in enumerate(names):
        module = recommender(shared)
        layer = next(iter(core.moe_layers(module).values()))
        with torch.no_grad():
            layer.experts.w_0[dead] = 0.0
            layer.experts.b_0[dead] = -1.0  # relu(-1) = 0
        reader = read(module, batch())
        use = {u.name: u for u in expert_use(reader.gates(), reader.zero_share())}
        assert (set(use), use[name].zero_share) == (set(names), 1.0)
        assert "collapsed" in use[name].problem
        assert all(u.zero_share < 1 for u in use.values() if u.name != name)


def test_the_zero_share_is_that_of_the_outputs_and_reading_leaves_nothing_behind():
    module = recommender(core.MMoE(2, MLP))
    layer = next(iter(core.moe_layers(module).values()))
    seen = []
    hook = module.model.shared.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    shares = read(module, batch(6), batch(9, seed=1)).zero_share()[""]
    hook.remove()
    x = torch.cat(seen)
    for e in range(2):
        y = (x @ layer.experts.w_0[e] + layer.experts.b_0[e]).relu()
        assert shares[f"shared{e}"] == pytest.approx(float((y == 0).double().mean()))
    module = recommender(core.CGC(2, MLP, num_task_experts=1))
    layer = next(iter(core.moe_layers(module).values()))
    read(module, batch())
    assert "each" not in vars(layer.experts)
    assert not layer.experts._forward_hooks
    assert not layer._tapes
    with pytest.raises(RuntimeError, match="stop"), GateReader(module).reading():
        raise RuntimeError("stop")
    assert "each" not in vars(layer.experts)


def gate(task: int | None, experts: tuple[str, ...], *rows: tuple[float, ...]) -> Gate:
    end = "tasks" if task is None else f"task{task}"
    return Gate("", end, task, experts, np.array(rows, dtype=np.float32), features().tasks)


def test_entropies_and_polarization_by_hand():
    # One expert an example, each expert for one example: 0, and of the mean (1/2, 1/2) log 2 / log 2 = 1.
    sure = gate(0, ("shared0", "shared1"), (1.0, 0.0), (0.0, 1.0))
    assert (sure.entropy, sure.mean_entropy) == (0.0, pytest.approx(1.0))
    even = gate(0, ("shared0", "shared1"), (0.5, 0.5), (0.5, 0.5))
    assert (even.entropy, even.mean_entropy) == (pytest.approx(1.0), pytest.approx(1.0))
    # 1/4, 3/4: (log 4 / 4 + 3/4 log(4/3)) / log 2 = 0.8113
    assert gate(0, ("a", "b"), (0.25, 0.75)).entropy == pytest.approx(0.8113, abs=1e-4)
    click = gate(0, ("shared0", "shared1", "shared2", "task0.0"), (0.495, 0.27, 0.005, 0.23))
    buy = gate(1, ("shared0", "shared1", "shared2", "task1.0"), (0.02, 0.94, 0.0, 0.04))
    zeros = {"": {"shared0": 0.2, "shared1": 0.95, "shared2": 0.1, "task0.0": 0.3, "task1.0": 0.3}}
    by_name = {u.name: u for u in expert_use([click, buy], zeros)}
    # 0.495 of 0.515 is 96 %: taken. 0.94 of 1.21 is 78 %. 0.005 and 0, of an even share of 1/4: at most 1 % and 2 %.
    assert (by_name["shared0"].problem, by_name["shared1"].problem) == ("taken by click", "collapsed")
    assert (by_name["shared2"].problem, by_name["task0.0"].problem) == ("taken by click", "")
    assert by_name["task1.0"].problem == "passed by"
    assert by_name["task1.0"].weights["click"] != by_name["task1.0"].weights["click"]  # NaN: it is not reached
    idle = gate(0, ("shared0", "shared1"), (0.996, 0.004))
    assert expert_use([idle], {})[1].problem == "unused"
    # Of many experts each task may have its own: that is what they are for.
    apart = [gate(0, ("0", "1"), (1.0, 0.0)), gate(1, ("0", "1"), (0.0, 1.0))]
    assert [u.problem for u in expert_use(apart, {})] == ["", ""]


def test_dependence_is_the_correlation_ratio():
    rows = [(0, 0.9), (0, 0.7), (1, 0.2), (1, 0.4), (1, 0.3)]
    city = torch.tensor([r[0] for r in rows])
    b = batch(5, tags=False)
    arrays = join([b], features(tags=False))
    arrays.ids_NF[:, 0] = city.numpy()
    weights = tuple((w, 1 - w) for _, w in rows)
    shares = dependence([gate(0, ("shared0", "shared1"), *weights)], arrays)
    # Mean 0.5; squares 0.16 + 0.04 + 0.09 + 0.01 + 0.04 = 0.34; between: 2 * 0.3^2 + 3 * 0.2^2 = 0.30.
    assert shares["city"]["click"] == pytest.approx(0.30 / 0.34, abs=1e-6)
    alike = dependence([gate(0, ("shared0", "shared1"), *[(0.5, 0.5)] * 5)], arrays)
    assert alike == {}


def test_numbers_are_cut_at_quantiles_and_the_domain_has_a_name_of_its_own():
    arrays = join([batch(8)], features())
    columns = {name: (codes, words) for name, codes, words in gating.coded_columns(arrays)}
    assert list(columns) == ["city", "age"]  # tags have several values, flat has one
    codes, words = columns["age"]
    assert words == ["to 20", "over 20 to 30", "over 30 to 50", "over 50", "missing"]
    assert codes[0] == codes[1] == 4  # NaN, infinite
    assert [words[c] for c in codes[2:4]] == [
        next(w for w, edge in zip(words, (20, 30, 50, np.inf), strict=False) if age <= edge)
        for age in arrays.dense_NC[2:4, 0]
    ]
    assert gating.domain_column(features(num_domains=2)) == "domain"
    named = dataclasses.replace(features(num_domains=2), categorical=(CategoricalFeature("domain", 5),))
    assert gating.domain_column(named) == "(domain)"
    assert "(domain)" in gating.coded_names(named)


@pytest.mark.parametrize("rate", [0.001, 0.4])
def test_calibration_curves_show_every_bin(rate):
    rng = np.random.default_rng(0)
    p = np.clip(rng.beta(2, 2 / rate - 2, 20_000), 1e-6, 1)
    bins = calibration(p, (rng.random(20_000) < p).astype(float))
    chart = calibration_chart("a", bins)
    assert chart.log_x == chart.log_y == (rate < 0.05)
    x, y = np.array(chart.lines[0].x), np.array(chart.lines[0].y)
    assert len(x) == 15
    # What the model says is what happens: on the diagonal but for chance.
    big = bins.positives > 0.01
    np.testing.assert_allclose(y[big], x[big], rtol=0.25)


def test_polarization_has_the_outputs_where_they_are_seen():
    gates = [gate(0, ("0", "1"), (0.2, 0.8))]
    weights, entropy = polarization("", expert_use(gates, {}), gates)
    assert weights.series == {gates[0].label: pytest.approx((20, 80))}
    assert list(entropy.series) == ["of an example", "of the mean weights"]
    zeros, *_ = polarization("", expert_use(gates, {"": {"0": 0.95, "1": 0.0}}), gates)
    assert (zeros.series, zeros.line) == ({"zero": (95, 0)}, 90)


def run(module: MultiTaskRecommender, tmp_path, data=None) -> Trainer:
    trainer = quiet_trainer(tmp_path)
    trainer.test(module, datamodule=data or MadeTable(), verbose=False)
    return trainer


@pytest.mark.parametrize(
    "shared",
    [core.MMoE(3, MLP), core.PLE(2, MLP, num_task_experts=1), core.MMoE(40, MLP, router=core.TokenChoice(top_k=2)),
     core.MMoE(4, MLP, router=core.TokenChoice(top_k=2), selection="shared"), core.OMoE(2, MLP),
     core.SMES(8, MLP, 2, 1), core.RankMixer(3, router=core.TokenChoice(2), num_tokens=2, token_dim=4, depth=1)],
    ids=["mmoe", "ple", "sparse", "selected", "omoe", "smes", "rank mixer"],
)  # fmt: skip
def test_a_test_writes_its_report(shared, tmp_path, capsys):
    pictures = shared.num_experts == 3 and isinstance(shared, core.MMoE)
    module = recommender(shared, report=RecommenderReportConfig(pictures=pictures))
    logged = run(module, tmp_path).callback_metrics
    shown = repr(load_sections(tmp_path / "report"))
    for words in (
        "Tasks: share of positive labels",
        "AUC within users",
        "Gates: entropy",
        "Experts",
        "depend on",
        "not measured (many values, several in a row, or one): film.tags, flat",
    ):
        assert words in shown, words
    assert capsys.readouterr().out.startswith("checks")
    report = tmp_path / "report"
    assert {p.name for p in report.iterdir()} == {
        *("tasks.csv", "gates.csv", "experts.csv", "dependence.csv", "sections.json"),
        *(f"{name}.png" for name in PICTURES if pictures),
    }
    with open(report / "tasks.csv") as file:
        rows = {row["task"]: row for row in csv.DictReader(file)}
    for task in ("click", "buy"):
        assert float(rows[task]["auc"]) == pytest.approx(float(logged[f"test/auc_{task}"]), abs=1e-6)
        assert int(rows[task]["rows"]) == 16
    with open(report / "experts.csv") as file:
        experts = list(csv.DictReader(file))
    gates = [name for name in experts[0] if name.startswith("weight_")]
    last = [e for e in experts if e["block"] == experts[-1]["block"]]
    reached = [sum(float(e[g]) for e in last if e[g] not in ("nan", "")) for g in gates]
    assert all(total == pytest.approx(1.0, abs=1e-4) for total in reached if total)


def test_a_model_without_gates_has_a_report_too(tmp_path, capsys):
    run(recommender(None), tmp_path)
    shown = repr(load_sections(tmp_path / "report"))
    assert "Tasks" in shown
    assert "Gates" not in shown
    assert {p.name for p in (tmp_path / "report").iterdir()} == {"tasks.csv", "calibration.png", "sections.json"}


def test_options_of_the_report(tmp_path, capsys):
    module = recommender(core.MMoE(3, MLP), report=RecommenderReportConfig(routing_examples=0, pictures=False))
    run(module, tmp_path)
    assert {p.name for p in (tmp_path / "report").iterdir()} == {"tasks.csv", "sections.json"}
    run(recommender(core.MMoE(3, MLP), report=RecommenderReportConfig(gate_feature="age")), tmp_path)
    for name in ("town", "film.tags", "flat"):  # no column, one of several values a row, one of one value
        folder = tmp_path / name
        with pytest.raises(ValueError, match=rf"report.gate_feature='{name}' is not one of city, age"):
            run(recommender(core.MMoE(3, MLP), report=RecommenderReportConfig(gate_feature=name)), folder)
        assert not (folder / "report").exists(), "known before the test is run"


@pytest.mark.parametrize("steps, reports", [(3, 0), (4, 1)])
def test_the_metrics_of_an_untrained_network_are_not_reported(steps, reports, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(checks, "suspicious_metrics", lambda by_task, split: seen.append(split) or [])
    trainer = quiet_trainer(tmp_path, max_steps=steps, num_sanity_val_steps=1)
    # An epoch has 4 steps and a validation at its end; another one came before the first step.
    trainer.fit(recommender(core.MMoE(3, MLP)).train(), datamodule=MadeTable(steps=4))
    assert seen == ["val"] * reports


def test_a_leak_is_reported_in_the_test_and_a_comparison_has_no_report(tmp_path, capsys):
    class Leaky(MadeTable):
        def test_dataloader(self):
            leaky = batch(64, seed=3)
            leaky.dense_BC[:, 1] = leaky.label_Bt[:, 0]
            return DataLoader([leaky], batch_size=None)

    module = recommender(core.MMoE(3, MLP))
    run(module, tmp_path, Leaky())
    assert "! column 'flat' alone predicts task 'click' with AUC 1.00000" in capsys.readouterr().out
    assert any(isinstance(c, RecommenderReport) for c in module.configure_callbacks())
    module.reports = False
    assert not any(isinstance(c, RecommenderReport) for c in module.configure_callbacks())


def test_cold_users_have_lines_of_their_own(tmp_path):
    metrics = MultiTaskMetrics(("click",))
    # The cold user's three rows are ranked without an error, the four others with one of four pairs.
    z = torch.tensor([1.0, -1.0, 0.0, 2.0, 1.0, 0.0, -1.0])[:, None]
    y = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0])[:, None]
    metrics.update(z, y, None, torch.tensor([1, 1, 1, 0, 0, 0, 0], dtype=torch.uint8))
    metrics.compute()
    section = write_parts(metrics.by_part, tmp_path)
    (table,) = section.parts
    warm, cold = table.rows
    assert warm[:4] == ("warm", "4", "click", "50")
    assert warm[5].startswith("AUC 0.75, ")
    assert cold[:4] == ("cold user", "3", "click", "33.33")
    assert cold[5].startswith("AUC 1, ")
    with open(tmp_path / "cold.csv", newline="") as file:
        assert [(row["part"], row["part_rows"], row["auc"]) for row in csv.DictReader(file)] == [
            ("warm", "4", "0.75"),
            ("cold_user", "3", "1.0"),
        ]


class Known:
    """Predicts both tasks by its column "right" and reads no other."""

    features = Features(
        continuous=tuple(map(ContinuousFeature, ("right", "noise"))),
        tasks=("click", "none"),
        positives=(0.5, 0.5),
    )
    outputs = Outputs(features.target_of_task)
    device = torch.device("cpu")

    def task_loss(self, batch):
        z_B = batch.dense_BC[:, 0]
        return SimpleNamespace(outputs=torch.stack((z_B, z_B), 1), targets=batch.label_Bt)


def test_what_decides_is_worth_all_and_noise_nothing():
    # 1,000 rows whose label is whether "right" is positive: AUC 1, and 0.5 once shuffled. The AUC of two random orders
    # of 500 and 500 has a standard deviation of sqrt(1001 / 12 / 500 / 500) = 0.018, its mean over 5 shuffles 0.008.
    right = torch.linspace(-1, 1, 1000)
    dense = torch.stack((right, torch.rand(1000)), 1)
    label = torch.stack(((right > 0).float(), torch.ones(1000)), 1)  # one class has no AUC
    rows = TableBatch(dense, torch.zeros(0, 1000, dtype=torch.int32), label, torch.arange(1000))
    found = shuffled_importances(Known(), rows, columns_of(Encoding(Known.features)))
    assert [(one.column, one.task, one.metric, one.rows) for one in found] == [
        ("right", "click", "auc", 1000),
        ("noise", "click", "auc", 1000),
    ]
    assert found[0].importance == pytest.approx(0.5, abs=4 * 0.008)
    assert 0 < found[0].ci95 < 0.1
    assert (found[1].importance, found[1].ci95) == (0, 0)


def test_the_parts_of_a_time_and_vectors_are_columns_of_the_table():
    own, rows = features(num_domains=2), batch(6, num_domains=2)
    order = torch.tensor([1, 2, 3, 4, 5, 0])
    for column in ("city", "film.tags"):
        new = shuffled(rows, own, {column}, order)
        for name in ("city", "film.tags"):
            before = rows_of(rows, own, name)
            assert rows_of(new, own, name) == ([*before[1:], before[0]] if name == column else before)
        assert new.dense_BC.equal(rows.dense_BC) or rows.dense_BC.isnan().any()
        assert new.domain_B.equal(rows.domain_B)
    new = shuffled(rows, own, {"age"}, order)
    assert new.dense_BC[0, 0].isinf(), "row 1's"
    assert new.dense_BC[5, 0].isnan(), "row 0's"
    assert rows_of(new, own, "film.tags") == rows_of(rows, own, "film.tags")
    assert shuffled(rows, own, {""}, order).domain_B.tolist() == rows.domain_B[order].tolist()
    own = Features(vectors=(VectorFeature("a", 1), VectorFeature("b", 2)))
    vectors = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    rows = TableBatch(
        torch.zeros(2, 0), torch.zeros(0, 2, dtype=torch.int32), torch.zeros(2, 0), torch.arange(2), vector_BV=vectors
    )
    assert shuffled(rows, own, {"b"}, torch.tensor([1, 0])).vector_BV.tolist() == [[1, 5, 6], [4, 2, 3]]
    hour, day = CategoricalFeature("ts_hour", 25), ContinuousFeature("ts_days")
    own = Features(categorical=(hour, CategoricalFeature("tab", 3)), continuous=(day,), num_domains=2)
    encoding = Encoding(own, domain="tab", timestamps={"ts": None})
    assert columns_of(encoding) == {"ts": {"ts_hour", "ts_days"}, "tab": {"tab", ""}}
    assert columns_of(Encoding(own)) == {"ts_hour": {"ts_hour"}, "tab": {"tab"}, "ts_days": {"ts_days"}}
