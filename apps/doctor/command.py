"""The whole of ``moesaic doctor``: read the log, look at the model, and print what is wrong."""

from __future__ import annotations

from pathlib import Path

import core
from apps.base.messages import counted
from apps.base.quiet import quiet
from apps.doctor.log import log_findings
from apps.doctor.options import Options
from apps.doctor.trial import Ablation, Trial
from apps.train.checkpoint.paths import find_checkpoint
from apps.train.watch.logs import read_rows

LOG, CONFIG = "metrics.csv", "config.yaml"


def run(options: Options) -> int:
    """Print a line for each finding, or that there is none.

    Returns:
        0 without findings, 1 with some.

    Raises:
        FileNotFoundError: there is neither a checkpoint nor a log.
        ValueError: the checkpoint is damaged, of another model than the configuration's, or of a dense one.
    """
    folder = options.ckpt_path if options.ckpt_path.is_dir() else options.ckpt_path.parent.parent
    rows = read_rows(folder / LOG)
    checkpoint, note = _checkpoint(options, folder, has_log=bool(rows))
    findings: dict[tuple[str, str], core.Finding] = {(f.name, f.layer): f for f in log_findings(rows)}
    looked_at = [f"{counted(len(rows), 'row')} of {folder / LOG}"] if rows else []
    ablation = None
    if checkpoint is not None:
        with quiet(own_notes=False):
            trial = Trial(checkpoint, options)
            of_model = trial.findings()
            ablation = trial.ablation() if options.ablate else None
        # The model itself knows more than its log.
        findings |= {(f.name, f.layer): f for f in of_model}
        routers = f"{counted(len(trial.layers), 'router')}"
        looked_at.append(f"{routers} on at most {options.batches} validation batches of {checkpoint}")
    if note:
        print(note)
    for finding in findings.values():
        print(finding)
    if checkpoint is not None or not findings:
        print(f"{counted(len(findings), 'finding') if findings else 'healthy'}: {', '.join(looked_at)}")
    if ablation is not None:
        for line in ablation_lines(ablation):
            print(line)
    return 1 if findings else 0


def _checkpoint(options: Options, folder: Path, has_log: bool) -> tuple[Path | None, str]:
    """Return the checkpoint to look at, and a line on why there is none; None: the log alone is read.

    Raises:
        FileNotFoundError: there is neither a checkpoint nor a log.
        ValueError: there is a checkpoint without a configuration, and no log.
    """
    if not options.batches:
        if not has_log:
            raise FileNotFoundError(f"--batches 0 reads {folder / LOG} alone, and it has no rows")
        return None, ""
    try:
        checkpoint = find_checkpoint(options.ckpt_path)
    except FileNotFoundError:
        if not has_log:
            raise
        return None, f"{options.ckpt_path} holds no checkpoint yet: {LOG} alone was read"
    if options.config is None and not (checkpoint.parent.parent / CONFIG).is_file():
        if not has_log:
            raise ValueError(
                f"no {CONFIG} lies beside {checkpoint}, and the validation data come from it: give --config FILE"
            )
        return None, f"no {CONFIG} lies beside {checkpoint}: {LOG} alone was read"
    return checkpoint, ""


def ablation_lines(ablation: Ablation) -> list[str]:
    """Return a line a layer: what the score loses without each expert, the dearest first."""
    sign = 1 if ablation.is_loss else -1
    lines = [f"{ablation.metric} {ablation.whole:.4g}; what it loses without an expert, the dearest first:"]
    for layer, scores in ablation.without.items():
        losses = {e: sign * (score - ablation.whole) for e, score in enumerate(scores)}
        ranked = sorted(losses, key=lambda e: -losses[e])
        lines.append(f"{layer}: " + ", ".join(f"expert {e} {losses[e]:+.4f}" for e in ranked))
    return lines
