"""The use of the experts, in the logs of a training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_app import TinyModule
from trainings import fit, rows

import core
from apps.report.live import RoutingDetail, load_map, show_loads
from apps.train.watch.logs import MetricsCSV

DETAILED = {"max_violation", "load_variation", "load_p5", "load_p25", "load_p50", "load_p75", "load_p95"}


def layer_stats(*chosen):
    chosen_E = torch.tensor(chosen)
    return core.telemetry.LayerStats(chosen_E, chosen_E, torch.tensor(0.0), chosen_E.sum())


def test_a_training_logs_the_detailed_figures_and_draws_after_each_validation(tmp_path):
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    module = TinyModule(3, moe=core.MoEConfig(4, core.TokenChoice(2)))
    fit(module, tmp_path, RoutingDetail(), max_epochs=2, logger=[MetricsCSV(str(tmp_path)), logger])
    logged = {name for row in rows(tmp_path) for name, value in row.items() if value}
    (layer,) = {name.split("/")[2] for name in logged if name.startswith("val/routing/") and name.count("/") == 3}
    assert {f"{prefix}/{layer}/{name}" for prefix in ("routing", "val/routing") for name in DETAILED} <= logged
    events = EventAccumulator(str(tmp_path), {"images": 0, "histograms": 0}).Reload()
    assert len(events.Images("val/routing/loads")) == len(events.Histograms(f"val/routing/{layer}/load")) == 2
    assert (module.detailed_routing, module.on_routing) == (False, None)  # a later test is brief again


def test_the_histogram_has_each_expert_s_load_over_the_mean(tmp_path):
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    show_loads([logger], core.RoutingStats({"a": layer_stats(6, 1, 1, 0), "b": layer_stats(2, 2)}), step=7)
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path), {"histograms": 0}).Reload()
    (of_a,) = events.Histograms("val/routing/a/load")
    # Loads 6, 1, 1, 0 over their mean 2 are 3, 0.5, 0.5, 0.
    assert (of_a.step, of_a.histogram_value.num, of_a.histogram_value.sum) == (7, 4, 4.0)
    assert of_a.histogram_value.sum_squares == pytest.approx(9.5)
    (of_b,) = events.Histograms("val/routing/b/load")
    assert (of_b.histogram_value.min, of_b.histogram_value.max) == (1.0, 1.0)


def test_the_map_shows_shares_and_leaves_missing_experts_empty():
    chart = load_map({"a": np.array([3.0, 0.5, 0.5, 0.0]), "b": np.array([1.0, 1.0])})
    assert chart.rows == ("a", "b")
    np.testing.assert_allclose(chart.values, [[75.0, 12.5, 12.5, 0.0], [50.0, 50.0, np.nan, np.nan]])


def test_another_module_is_refused():
    with pytest.raises(ValueError, match="not a LightningModule"):
        RoutingDetail().setup(None, LightningModule(), "fit")
