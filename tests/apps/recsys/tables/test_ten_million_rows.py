"""A table of ten million rows on one machine: the fused optimizer touches the rows of a batch and no others."""

from __future__ import annotations

import pytest
import torch
from places import ROOT

from apps.cli.train import build, quiet

CONFIG = ROOT / "configs" / "recsys" / "ten_million_rows.yaml"
STEPS = 20


@pytest.mark.slow
def test_ten_million_rows_train_in_their_own_memory(tmp_path):
    flags = {
        "trainer.max_epochs": 1,
        "trainer.limit_train_batches": STEPS,
        "trainer.limit_val_batches": 1,
        "trainer.enable_checkpointing": "false",
        "data.cache_dir": tmp_path,
        "run_dir": tmp_path / "run",
    }
    with quiet():
        cli = build("fit", ["--config", str(CONFIG), *(f"--{name}={value}" for name, value in flags.items())])
        sparse = cli.model.members[0].sparse
        (table,) = sparse.tables().values()
        # 10^7 rows of 16 floats are 640 MB.
        assert table.shape == (10_000_000, 16)
        assert table.untyped_storage().nbytes() == 640_000_000
        start = table.clone()
        seen: list[torch.Tensor] = []
        task_loss = cli.model.task_loss

        def noted(batch):
            if cli.model.training:
                seen.append(batch.single_FB[0])
            return task_loss(batch)

        cli.model.task_loss = noted
        cli.execute()
    ids = torch.cat(seen).unique()
    assert len(seen) == STEPS
    assert STEPS * 100 < len(ids) <= STEPS * 1024
    moved = (table != start).any(1).nonzero().flatten()
    assert set(moved.tolist()) <= set(ids.tolist())
    assert len(moved) > 0.99 * len(ids)
    # Rowwise Adagrad has a number a row, 40 MB, and it is 0 where no batch came.
    (state,) = sparse.fused_state().values()
    (momentum,) = state.values()
    assert momentum.numel() * momentum.element_size() == 40_000_000
    assert set(momentum.flatten().nonzero().flatten().tolist()) <= set(ids.tolist())
    # The module's own optimizer keeps nothing of the table.
    (optimizer,) = cli.trainer.optimizers
    kept = sum(t.numel() for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor))
    assert kept < 100_000
