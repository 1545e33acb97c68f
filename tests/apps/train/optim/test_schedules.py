"""Experts that are averaged, that start as one, or that grow in number while a model trains."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from lightning.pytorch import Callback
from tiny_app import CONFIG, TinyModule
from torch.testing import assert_close
from trainings import MOE, fit, load

import core
from apps.cli import main
from apps.cli.train import build
from apps.train.optim.optimizers import OptimizerConfig
from apps.train.optim.schedules import ExpertAveraging, GrowingTopK, SharedStart, average
from apps.train.step.growing import GrowConfig

STEPS = 9  # of an epoch: 66 points, 8 a step
CONSTANT = OptimizerConfig(lr=0.02, schedule="constant")
ALL = dataclasses.replace(MOE, router=core.TokenChoice(top_k=4, normalize=False))


def sparse(moe=MOE, **options) -> TinyModule:
    torch.manual_seed(0)
    return TinyModule(3, moe=moe, optimizer=CONSTANT, **options)


def experts(module: TinyModule) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.net[3].experts.named_parameters()}


class Seen(Callback):
    """Keeps what ``look`` returns at the end of each step."""

    def __init__(self, look) -> None:
        self.look, self.values, self.validated = look, [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.values.append(self.look(pl_module))

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.validated.append(self.look(pl_module))


# ---- averaging


def test_experts_move_to_their_mean_by_hand():
    # 1, 2, 6: mean 3. A half of the way: 2, 2.5, 4.5.
    layer = core.FFN(1).build(3, 1)
    with torch.no_grad():
        layer.w_in.copy_(torch.tensor([1.0, 2.0, 6.0]).view(3, 1, 1))
    average(layer, 0.5)
    assert layer.w_in.flatten().tolist() == [2.0, 2.5, 4.5]
    average(layer, 1.0)
    assert layer.w_in.flatten().tolist() == [3.0, 3.0, 3.0]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_each_step_is_the_optimizer_s_and_then_the_average(tmp_path, name):
    optimizer = dataclasses.replace(CONSTANT, name=name)
    ends = {}
    for share in (None, 0.4):
        torch.manual_seed(0)
        module = TinyModule(3, moe=MOE, optimizer=optimizer)
        callbacks = [] if share is None else [ExpertAveraging(share)]
        fit(module, tmp_path / str(share), *callbacks, max_steps=1, max_epochs=-1)
        ends[share] = experts(module)
    for parameter, plain in ends[None].items():
        expected = torch.stack([w + 0.4 * (sum(plain) / 4 - w) for w in plain])
        assert_close(ends[0.4][parameter], expected, rtol=1e-5, atol=1e-7)


def test_averaging_ends_where_it_is_told(tmp_path):
    spread = Seen(lambda module: float(module.net[3].experts.w_in.detach().std(0).max()))
    fit(sparse(), tmp_path, ExpertAveraging(1.0, until=0.5), spread)
    assert [value < 1e-6 for value in spread.values] == [True] * 4 + [False] * (STEPS - 4)  # round(4.5) = 4


def test_the_mean_of_averaged_experts_is_the_evaluation_of_random_ones(tmp_path):
    module = sparse(core.MoEConfig(4, core.Random(evaluation="merged"), core.FFN(8, bias=True)))
    fit(module, tmp_path, ExpertAveraging(0.3))
    x, layer = torch.randn(5, 8), module.eval().net[3]
    assert_close(layer(x), core.average_experts(layer)(x), rtol=1e-4, atol=1e-6)


# ---- one start


def test_experts_are_one_and_then_differ_by_their_masks(tmp_path):
    def look(module):
        w_in = module.net[3].experts.w_in.detach()
        return float(w_in.std(0).max()), float((w_in == 0).float().mean())

    seen = Seen(look)
    fit(sparse(), tmp_path, SharedStart(until=4 / STEPS, mask=0.25, seed=3), seen)
    spreads, zeros = zip(*seen.values, strict=True)
    assert [spread < 1e-6 for spread in spreads] == [True] * 3 + [False] * (STEPS - 3)
    drawn = torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(3))
    assert zeros[3] == float((drawn < 0.25).float().mean())
    assert zeros[:3] == (0.0,) * 3
    assert zeros[4] == 0.0  # they train on


@pytest.mark.parametrize("epochs", [1, 2], ids=["within", "after"])
def test_a_resumed_run_goes_on_as_one_run(tmp_path, epochs):
    # The experts are one for 9 of 18 steps, and for 13 of 27: the run stops at the mask, or after it.
    total = epochs + 1
    for name, end in (("whole", None), ("parts", epochs)):
        fit(sparse(), tmp_path / name, SharedStart(until=0.5), StopAfter(end), max_epochs=total)
    rest, last = sparse(), str(tmp_path / "parts" / "last.ckpt")
    fit(rest, tmp_path / "parts", SharedStart(until=0.5), max_epochs=total, ckpt_path=last)
    assert_close(rest.state_dict(), load(tmp_path / "whole" / "last.ckpt")["state_dict"], rtol=0, atol=0)


class StopAfter(Callback):
    """Ends a training after some epochs; None: never."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        trainer.should_stop = trainer.current_epoch + 1 == self.limit


# ---- a growing top-k


def test_tokens_take_one_more_expert_in_equal_times_and_all_in_validation(tmp_path):
    seen = Seen(lambda module: module.net[3].router.config.top_k)
    module = sparse(ALL)
    gate = module.net[3].router.gate.weight.detach().clone()
    fit(module, tmp_path, GrowingTopK(), seen)
    # Steps 0 to 8 of 9: 1 + floor(4 step / 9).
    assert seen.values == [1 + 4 * step // 9 for step in range(STEPS)] == [1, 1, 1, 2, 2, 3, 3, 4, 4]
    assert set(seen.validated) == {4}
    assert module.net[3].router.config == ALL.router
    assert torch.equal(module.net[3].router.gate.weight, gate)


def test_the_step_computes_so_many_experts(tmp_path):
    seen = Seen(lambda module: int(module._last_tape_pairs))

    class Counting(TinyModule):
        _last_tape_pairs = 0

        def training_loss(self, batch):
            result = super().training_loss(batch)
            chosen_E = result.tape.entries[0].routing.chosen_per_expert_E
            self._last_tape_pairs = int(chosen_E.sum()) // len(batch[1])
            return result

    module = Counting(3, moe=ALL, optimizer=CONSTANT)
    gate = module.net[3].router.gate.weight.detach().clone()
    fit(module, tmp_path, GrowingTopK(start=2, until=0.5, freeze=False), seen)
    assert not torch.equal(module.net[3].router.gate.weight, gate)
    # 4 steps to grow: 2 + floor(3 step / 4), at most 4.
    assert seen.values == [2, 2, 3, 4, 4, 4, 4, 4, 4]


def test_compiled_code_takes_the_new_number():
    layer = ALL.build(8)
    compiled = torch.compile(layer, backend="eager")
    x = torch.randn(6, 8)
    for top_k in (4, 1):
        layer.router.config = dataclasses.replace(ALL.router, top_k=top_k)
        assert_close(compiled(x), layer(x))


# ---- what does not fit


def test_a_dense_model_is_left_as_it_is_with_a_warning(tmp_path, caplog):
    ends = []
    for callbacks in ((), (ExpertAveraging(), GrowingTopK(), SharedStart())):
        module = sparse(None)
        torch.manual_seed(1)
        fit(module, tmp_path / str(len(callbacks)), *callbacks)
        ends.append(module.state_dict())
    assert_close(*ends, rtol=0, atol=0)
    assert caplog.text.count("trains as without it") == 3


MIXED = core.MoEConfig(4, core.TokenChoice(top_k=2), core.Mixed((core.FFN(8), core.FFN(4)), (2, 2)))
REFUSED = {
    "kinds": (ExpertAveraging(), MIXED, {}, "the experts of net.3 are of several kinds"),
    "frozen": (ExpertAveraging(), MOE, {"grow": GrowConfig("runs")}, "model.grow.freeze=True keeps some"),
    "start": (GrowingTopK(start=3), MOE, {}, "start=3 exceeds top_k=2"),
    "no logits": (GrowingTopK(), core.MoEConfig(4, core.Random(2), core.FFN(8)), {}, "no router takes the top_k"),
    "second": (
        GrowingTopK(),
        core.MoEConfig(4, core.TokenChoice(2, second_expert_policy="random"), core.FFN(8)),
        {},
        "second_expert_policy='random' needs top_k=2, not top_k=1",
    ),
}


@pytest.mark.parametrize(("callback", "moe", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_models_that_do_not_fit_are_refused(tmp_path, callback, moe, options, message):
    module = sparse(moe, **options)
    module.starts_afresh = False  # nothing to grow from is read
    with pytest.raises(ValueError, match=message):
        fit(module, tmp_path, callback)


def test_values_out_of_range_and_a_training_without_an_end_are_refused(tmp_path):
    for kind, options, message in (
        (ExpertAveraging, {"share": 0.0}, r"share=0\.0 is not in \(0, 1\]"),
        (ExpertAveraging, {"until": 1.5}, r"until=1\.5 is not in \(0, 1\]"),
        (SharedStart, {"mask": 1.0}, r"mask=1\.0 is not in \[0, 1\)"),
        (GrowingTopK, {"start": 0}, "start=0 is not at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            kind(**options)
    with pytest.raises(ValueError, match="this one has no end"):
        fit(sparse(ALL), tmp_path, GrowingTopK(), max_epochs=-1)


def test_the_command_line_takes_schedules_by_their_short_names(tmp_path):
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    callback = "{class_path: ExpertAveraging, init_args: {share: 1.0}}"
    (tmp_path / "schedule.yaml").write_text(f"trainer: {{callbacks: [{callback}]}}")
    run = ["--run_dir", str(tmp_path / "run")]
    assert main(["fit", *(f"--config={tmp_path / name}.yaml" for name in ("tiny", "schedule")), *run]) == 0
    w_in = load(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]["net.3.experts.w_in"]
    assert float(w_in.std(0).max()) < 1e-6
    build("test", ["--ckpt_path", str(tmp_path / "run")])
