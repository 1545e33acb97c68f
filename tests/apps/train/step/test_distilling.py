"""A training that learns what a trained model predicts."""

from __future__ import annotations

import math

import pytest
import torch
from taught import kl, saved, taught
from tiny_app import TinyData, TinyModule
from tiny_runs import copy_run
from torch.testing import assert_close
from trainings import MOE, fit, load, rows

from apps.cli import main
from apps.train.optim.optimizers import OptimizerConfig
from apps.train.step.distilling import ClassLogits, DistilConfig
from apps.train.step.growing import GrowConfig
from apps.train.step.module import SparseModule

FAST = OptimizerConfig(lr=0.02, schedule="constant")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of a sparse model, and the model."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    fit(module := TinyModule(3, moe=MOE, optimizer=FAST), folder, max_epochs=4)
    return folder, module.eval()


def student(folder, dropout=0.0, moe=None, width=8, **options) -> TinyModule:
    """A dense model that is to learn from a run."""
    return TinyModule(3, width, moe, dropout, optimizer=FAST, distil=DistilConfig(str(folder), **options))


def one_batch():
    return next(iter(TinyData().val_dataloader()))


def test_the_divergence_by_hand():
    # The teacher says 3/4 and 1/4, the student 1/2 and 1/2; at T = 2 the teacher's odds are sqrt(3) to 1.
    teacher, pupil = ClassLogits(torch.tensor([[math.log(3.0), 0.0]])), ClassLogits(torch.zeros(1, 2))
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(pupil.divergence(teacher, 1.0)) == pytest.approx(expected, rel=1e-6)
    p = math.sqrt(3) / (1 + math.sqrt(3))
    expected = p * math.log(2 * p) + (1 - p) * math.log(2 - 2 * p)
    assert float(pupil.divergence(teacher, 2.0)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_loss_is_the_labels_and_the_teacher_s_in_their_shares(trained, temperature):
    folder, teacher = trained
    module = taught(student(folder, weight=0.75, temperature=temperature)).train()
    loss, out, *_ = module.training_loss(batch := one_batch())
    x, y = batch
    with torch.no_grad():
        logits, given = module(x), teacher(x)
    label = torch.stack([-logits[i].log_softmax(-1)[y[i]] for i in range(len(y))]).mean()
    soft = temperature**2 * kl(given, logits, temperature).float()
    assert_close(loss.detach(), 0.25 * label + 0.75 * soft, rtol=1e-5, atol=0)
    assert_close(out.terms["label_loss"], label, rtol=1e-5, atol=0)
    assert_close(out.terms["teacher_loss"], soft, rtol=1e-5, atol=0)


def test_a_balance_loss_is_added_whole(trained):
    module = taught(student(trained[0], moe=MOE)).train()
    loss, out, aux, _ = module.training_loss(one_batch())
    assert_close(loss, out.loss + aux.total)
    assert float(aux.total.detach()) > 0


def test_the_teacher_is_in_evaluation_and_its_passes_are_not_recorded(trained):
    module = taught(student(trained[0], moe=MOE)).train()
    *_, tape = module.training_loss(one_batch())
    assert len(tape.entries) == 1
    assert not module._teacher.model.training
    assert not any(p.requires_grad for p in module._teacher.model.parameters())


def test_what_equals_the_teacher_learns_nothing_from_it(trained):
    folder, teacher = trained
    module = taught(TinyModule(3, moe=MOE, dropout=0.0, distil=DistilConfig(str(folder), weight=1.0)))
    module.load_state_dict(teacher.state_dict())
    loss, out, *_ = module.train().training_loss(one_batch())
    out.loss.backward()
    assert float(out.loss.detach()) == pytest.approx(0.0, abs=1e-6)
    assert max(float(p.grad.abs().max()) for p in module.net[-1].parameters()) < 1e-6


def test_a_student_comes_to_predict_as_its_teacher_and_no_checkpoint_has_that(trained, tmp_path):
    folder, teacher = trained
    module = student(folder, weight=1.0)
    x, _ = one_batch()
    with torch.no_grad():
        before = kl(teacher(x), module(x), 1.0)
        fit(module, tmp_path, max_epochs=4)
        after = kl(teacher(x), module(x), 1.0)
    assert after < 0.3 * before
    assert load(tmp_path / "last.ckpt")["state_dict"].keys() == TinyModule(3).state_dict().keys()
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in TinyModule(3).parameters())
    logged = [row for row in rows(tmp_path) if row["train/teacher_loss"]]
    assert len(logged) == 4 * 9  # epochs of 66 points, 8 a step
    assert all(float(r["train/loss"]) == pytest.approx(float(r["train/teacher_loss"])) for r in logged)


def test_a_resumed_run_goes_on_as_one_run(trained, tmp_path):
    for name, epochs in (("whole", 2), ("parts", 1)):
        torch.manual_seed(1)
        fit(student(trained[0], dropout=0.1), tmp_path / name, max_epochs=epochs)
    rest = student(trained[0], dropout=0.1)
    fit(rest, tmp_path / "parts", max_epochs=2, ckpt_path=str(tmp_path / "parts" / "last.ckpt"))
    assert_close(rest.state_dict(), load(tmp_path / "whole" / "last.ckpt")["state_dict"], rtol=0, atol=0)


def test_copy_begins_with_the_teacher_s_dense_tensors(trained):
    folder, teacher = trained
    module = student(folder, moe=MOE, copy=True)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    taught(module)
    for name, value in module.state_dict().items():
        sparse = name.startswith("net.3.")
        assert torch.equal(value, before[name] if sparse else teacher.state_dict()[name]), name
    resumed = student(folder, moe=MOE, copy=True)
    resumed.starts_afresh = False  # as the command line says it where a run resumes a checkpoint
    untouched = resumed.net[0].weight.clone()
    assert torch.equal(taught(resumed).net[0].weight, untouched)


def test_teachers_that_do_not_fit_are_refused(trained, tmp_path):
    class OtherModule(TinyModule):
        pass

    class Untaught(SparseModule):
        def __init__(self, distil: DistilConfig | None = None) -> None:
            super().__init__(distil=distil)

    with pytest.raises(ValueError, match="no tensor outside the MoE layers has a name and shape of"):
        taught(TinyModule(3, 10, distil=DistilConfig(str(trained[0]), copy=True)))
    with pytest.raises(ValueError, match=r"distil\.copy=True with grow"):
        TinyModule(3, moe=MOE, grow=GrowConfig("runs"), distil=DistilConfig("runs", copy=True))
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        taught(student(tmp_path / "gone"))
    with pytest.raises(
        ValueError, match=r"holds a model of class tiny_app\.TinyModule, and this run's is of class .*OtherModule"
    ):
        taught(OtherModule(3, distil=DistilConfig(str(trained[0]))))
    four = saved(TinyModule(4), tmp_path / "four.ckpt")
    with pytest.raises(ValueError, match=r"predicts other targets: its num_classes is 4, and this run's is 3"):
        taught(student(four))
    with pytest.raises(ValueError, match=r"Untaught has no method distribution\(batch\)"):
        Untaught(DistilConfig("runs"))


def test_the_command_line_teaches_a_dense_model_tests_and_resumes_it(tmp_path, tmp_path_factory):
    large = copy_run(tmp_path_factory, tmp_path)
    overlay = f"model: {{init_args: {{moe: null, distil: {{teacher: {large}}}}}}}"
    (tmp_path / "distil.yaml").write_text(overlay)
    config = ["--config", str(tmp_path / "tiny.yaml"), "--config", str(tmp_path / "distil.yaml")]
    where = [*config, "--run_dir", str(tmp_path / "small")]
    assert main(["fit", *where]) == 0
    assert main(["fit", *where, "--ckpt_path", "last", "--trainer.max_epochs", "2"]) == 0
    (large / "checkpoints" / "best.ckpt").unlink()
    assert main(["test", *where]) == 0
