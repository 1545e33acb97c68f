"""Numbers that are not finite end a training, and no checkpoint holds them."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from tiny_app import TinyModule
from trainings import MOE, fit, load

from apps.train.step.finite import NonFiniteError


def test_a_loss_that_is_nan_names_step_terms_and_advice_and_spares_the_checkpoint(tmp_path):
    module = TinyModule(3, moe=MOE, explode_at=12, ema_decay=0.9)  # 9 steps an epoch
    with pytest.raises(NonFiniteError, match=r"nan at step 13 \(task loss=nan, load_balancing_loss=.*lr \(now 0.001\)"):
        fit(module, tmp_path, max_epochs=3)
    checkpoint = load(tmp_path / "last.ckpt")
    assert checkpoint["global_step"] == 9
    assert all(torch.isfinite(v).all() for v in checkpoint["state_dict"].values())


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    class Poison(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 18:  # the last step of the second epoch: the loss is seen no more
                with torch.no_grad():
                    pl_module.net[0].weight[0, 0] = float("inf")

    with pytest.raises(NonFiniteError, match=r"net\.0\.weight is not finite after step 18"):
        fit(TinyModule(3), tmp_path, Poison(), max_epochs=2)
    assert load(tmp_path / "last.ckpt")["global_step"] == 9
