"""``RoutingDetail`` shows the use of the experts while a model trains: in TensorBoard, W&B and MLflow."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

import core
from apps.report.page import HeatmapChart, png_of
from apps.train.step.balance import balance_of

if TYPE_CHECKING:
    from PIL.Image import Image


class RoutingDetail(Callback):
    """Logs the detailed figures of each MoE layer, and plots the load of its experts after each validation.

    The figures are ``core.telemetry.LayerStats.figures(detailed=True)``, in every log. After a validation TensorBoard
    and W&B get a histogram of each layer's load over the mean, and they and MLflow a heat map of all loads.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        balance = balance_of(pl_module)
        if balance is None:
            kind = type(pl_module).__name__
            raise ValueError(f"RoutingDetail reads a model of the suite or under sparsify, not a {kind}")

        def draw(prefix: str, stats: core.RoutingStats) -> None:
            if prefix == "val/routing" and trainer.is_global_zero and not trainer.sanity_checking:
                show_loads(trainer.loggers, stats, trainer.global_step)

        balance.detailed, balance.on_routing = True, draw

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        balance = balance_of(pl_module)
        assert balance is not None
        balance.detailed, balance.on_routing = False, None


def show_loads(loggers: list[Logger], stats: core.RoutingStats, step: int) -> None:
    """Log a histogram of each layer's loads, and a heat map of all of them, if a logger can show one.

    Args:
        loggers: Lightning's; loggers that only take numbers are left out.
        stats: of all ranks.
        step: optimizer step of the log.
    """
    loads = {name: layer.relative_load.cpu().numpy() for name, layer in stats.layers.items()}
    able = [logger for logger in loggers if isinstance(logger, (TensorBoardLogger, WandbLogger, MLFlowLogger))]
    if not able:
        return
    from PIL import Image

    chart = load_map(loads)
    image = Image.open(io.BytesIO(png_of([chart], chart.title))).convert("RGB")
    for logger in able:
        for name, load_E in loads.items():
            _log_histogram(logger, f"val/routing/{name}/load", load_E, step)
        _log_image(logger, "val/routing/loads", image, step)


def load_map(loads: dict[str, np.ndarray]) -> HeatmapChart:
    """Return the share of the pairs that each expert takes, one row per layer.

    Args:
        loads: layer name to (E,) loads over the mean; E may differ.
    """
    values = np.full((len(loads), max(map(len, loads.values()))), np.nan)
    for row, load_E in zip(values, loads.values(), strict=True):
        row[: len(load_E)] = load_E / len(load_E)
    title, share = "Load of the experts", "share of pairs, %"
    return HeatmapChart.of(values, list(loads), title=title, row_title="layer", value_title=share)


def _log_histogram(logger: Logger, name: str, values: np.ndarray, step: int) -> None:
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_histogram(name, values, step)
    elif isinstance(logger, WandbLogger):
        import wandb

        histogram: Any = wandb.Histogram(np_histogram=np.histogram(values, bins=32))
        logger.log_metrics({name: histogram}, step)
    # MLflow has no histograms; the percentiles are among its figures.


def _log_image(logger: Logger, name: str, image: Image, step: int) -> None:
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, np.asarray(image), step, dataformats="HWC")
    elif isinstance(logger, WandbLogger):
        import wandb

        logger.log_metrics({name: wandb.Image(image)}, step)  # type: ignore[dict-item]
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_image(logger.run_id, image, f"{name}/{step:08d}.png")
