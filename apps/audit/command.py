"""The command ``moesaic audit``: read the files, and print what is wrong with them."""

from __future__ import annotations

import json
import sys

from apps.audit.checkpoint import Faults, Weights, read_parts
from apps.audit.options import AuditOptions
from apps.audit.rules import find_holes, find_odd, find_pinned, find_uncovered, find_untied, find_wrong_values
from apps.base.messages import counted, some
from apps.porting.files import ADAPTER_CONFIG, read_json


def run(options: AuditOptions) -> int:
    """Print a line for each fault, or that there is none.

    Returns:
        0 without findings, 1 with some.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: it holds no safetensors, or a file is damaged.
    """
    faults = Faults(list)
    weights = Weights(options.path, faults)
    settings = weights.folder / ADAPTER_CONFIG
    parts = read_parts(weights, faults, prefix="base_model.model." if settings.is_file() else "")
    if settings.is_file():
        find_uncovered(parts, read_json(settings), faults)
    else:
        find_holes(weights, parts, faults)
        find_odd(weights, parts, faults)
        find_untied(weights, faults)
    find_pinned(weights, parts, faults)
    if find_wrong_values(weights, parts, faults):
        print("note: nearly all experts look like their initialization: the model seems untrained", file=sys.stderr)
    rows = [{"finding": name, "tensors": names, "evidence": text} for (name, text), names in faults.items()]
    lines = [f"{some(names, 12)}: {name.replace('_', ' ')}: {text}" for (name, text), names in faults.items()]
    layers = counted(len({part.layer for part in parts}), "MoE layer")
    lines.append(f"{counted(len(faults), 'finding') if faults else 'sound'}: {options.path}, {layers}")
    print(json.dumps(rows, indent=2) if options.json else "\n".join(lines))
    return 1 if faults else 0
