"""The command ``moesaic plan``: outline a model, go through the layouts, and show them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import yaml

from apps.base.files import write_text
from apps.base.messages import counted
from apps.base.quiet import quiet
from apps.cli.errors import UsageError
from apps.plan.layout import Cost, Sweep, hidden_units, sweep
from apps.plan.options import PlanOptions
from apps.plan.outline import Outline, outlined
from apps.report.tables import print_table, write_csv
from apps.task.sizes import Missing


def run(options: PlanOptions) -> int:
    """Print the plan, and write its files where a folder is named."""
    try:
        with quiet():
            outline = outlined(options)
    except Missing as missing:
        raise UsageError(str(missing)) from None
    plan = sweep(outline, options)
    for line in header(outline, options):
        print(line)
    table = [shown(row) for row in rows(plan)]
    if not outline.tables:
        print(MESH)
    print(COLUMNS)
    print_table("", list(table[0]), [list(row.values()) for row in table])
    if not plan.best.fits:
        print("nothing fits: the row with * needs the least memory")
    for line in (*plan.breaks(), *details(plan.best)):
        print(line)
    print()
    print(overlay(plan.best, options), end="")
    if options.output is not None:
        write_text(options.output / "overlay.yaml", overlay(plan.best, options))
        write_csv(options.output / "plan.csv", rows(plan))
        print(f"{options.output}: overlay.yaml, plan.csv")
    return 0


def rows(sweep: Sweep) -> list[dict[str, Any]]:
    """Return a row for each expert-parallel degree, by column, for a table and a CSV file."""
    return [
        {
            "degree": one.layout.degree,
            "best": "*" if one is sweep.best else "",
            "mesh": " x ".join(map(str, one.layout.mesh)),
            "rest": one.layout.rest,
            **({} if one.sharding is None else {"tables": one.sharding}),
            "fits": "yes" if one.fits else "no",
            "GB": _short(one.memory.total / 1e9),
            "step ms": _short(1e3 * one.seconds),
            "compute": _short(1e3 * one.compute),
            "all-to-all": _short(1e3 * one.exchange),
            "sharding": _short(1e3 * one.data),
            "all-to-all %": f"{100 * one.share:.0f}",
        }
        for one in sweep.costs
    ]


def _short(value: float) -> str:
    """Return a number with three digits, or all of those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


MESH = "mesh: shards x nodes x experts x hidden, and replicas of it on all GPUs"
COLUMNS = """\
* the best; ! does not fit; times in ms; sharding: parameters gathered and
gradients reduced, while products are computed"""
"""What the table's columns mean."""


def shown(row: dict[str, Any]) -> dict[str, str]:
    """Return a row as it is in a terminal of 80 columns.

    Apart from tables all GPUs are replicas, so the way to shard the tables is shown instead of the mesh.
    """
    first = {
        "degree": f"{row['degree']}{row['best']}",
        "mesh": "x".join(row["mesh"].split(" x ")[1:]),
        "rest": {"replicate": "copy", "shard": "shard"}[row["rest"]],
    }
    return {
        **({"tables": f"{row['tables']}{row['best']}"} if "tables" in row else first),
        "GB": row["GB"] + ("" if row["fits"] == "yes" else "!"),
        "step": row["step ms"],
        **{name: row[name] for name in ("compute", "all-to-all", "sharding")},
    }


def header(outline: Outline, options: PlanOptions) -> list[str]:
    """Return the lines above the table: the model, the batch and the GPUs."""
    trial, gpu = outline.trial, options.gpu
    layers = list(outline.layers.values())
    experts = ""
    if layers:
        sizes = sorted({layer.num_experts for layer in layers})
        experts = f", {counted(len(layers), 'MoE layer')} of {' and '.join(map(str, sizes))} experts"
        units = sorted({hidden_units(layer) for layer in layers})
        experts += f" with {' and '.join(map(str, units))} hidden units" if units[0] > 1 else ""
    lines = [
        f"{outline.kind}: {outline.num_params:,} parameters{experts}",
        f"a GPU's batch: {counted(trial.examples, 'example')}, {trial.tokens:,} {trial.unit}, "
        f"{outline.flops:.3g} FLOPs forward",
        f"{options.gpus} x {options.gpu_name}: {gpu.memory / 1e9:.0f} GB, {_short(gpu.within / 1e9)} and "
        f"{_short(gpu.between / 1e9)} GB/s within and between nodes of {options.gpus_per_node}, "
        f"{options.efficiency:.0%} of {_short(options.rate / 1e12)} TFLOP/s, {options.precision}"
        + (", parameters gathered in bfloat16" if options.param_dtype else "")
        + (", activation checkpointing" if options.checkpointing else ""),
    ]
    lines += [trial.remark] if trial.remark else []
    if outline.undivided is not None:
        lines.append(f"experts stay whole: {outline.undivided}")
    elif not layers:
        lines.append("no MoE layer: FSDP2 or DDP alone")
    return lines


def details(one: Cost) -> list[str]:
    """Return the lines on the best layout: the parts of its memory, and what leaves a GPU in a step."""
    moved = {name: t for name, t in one.traffic.items() if t.total}
    lines = [
        "memory a GPU, GB: " + ", ".join(f"{name} {_short(size / 1e9)}" for name, size in asdict(one.memory).items())
    ]
    if moved:
        sent = (f"{name} {t.within / 1e9:.3f} and {t.between / 1e9:.3f}" for name, t in moved.items())
        lines.append("leaves a GPU in a step within and between nodes, GB: " + ", ".join(sent))
    return lines


def overlay(one: Cost, options: PlanOptions) -> str:
    """Return the configuration that lays a training out so, as YAML."""
    layout = one.layout
    arguments: dict[str, Any]
    if one.sharding is not None:
        kind, arguments = "TorchRecStrategy", {"sharding": one.sharding}
    else:
        kind = "ExpertParallelStrategy"
        arguments = {"expert_parallel_size": layout.experts, "fsdp_size": layout.shards, "non_experts": layout.rest}
        arguments |= {"nodes": layout.nodes} if layout.nodes > 1 else {}
        arguments |= {"expert_tensor_parallel_size": layout.hidden} if layout.hidden > 1 else {}
        arguments |= {"param_dtype": options.param_dtype} if options.param_dtype is not None else {}
        arguments |= {"static_all_to_all": True} if options.static else {}
        arguments |= {"activation_checkpointing": True} if options.checkpointing else {}
    trainer = {
        "accelerator": "gpu",
        "devices": options.node,
        "num_nodes": options.gpus // options.node,
        "precision": options.precision,
        "strategy": {"class_path": kind, "init_args": arguments},
    }
    return yaml.safe_dump({"trainer": trainer}, sort_keys=False)
