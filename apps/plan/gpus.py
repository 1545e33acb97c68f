"""Published peaks of GPUs, by name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """What a GPU can do at best.

    Attributes:
        memory: bytes.
        half: FLOP/s of dense products in bfloat16.
        single: FLOP/s of dense products in float32, without TF32.
        within: bytes a second that leave it for GPUs of its node.
        between: bytes a second that leave it for other nodes.
    """

    memory: float
    half: float
    single: float
    within: float
    between: float


# NVIDIA's data sheets of A100 (SXM, 80 GB), H100 (SXM), H200 (SXM) and HGX B200, and AMD's of MI300X: dense products,
# without sparsity. A link's figure there counts both directions: NVLink 600, 900, 900 and 1800 GB/s, Infinity Fabric
# 896 GB/s. Between nodes a network port of each GPU: 200 Gb/s in DGX A100, 400 Gb/s in the others' reference machines.
GPUS = {
    "a100": Gpu(80e9, 312e12, 19.5e12, 300e9, 25e9),
    "h100": Gpu(80e9, 989e12, 67e12, 450e9, 50e9),
    "h200": Gpu(141e9, 989e12, 67e12, 450e9, 50e9),
    "b200": Gpu(180e9, 2250e12, 75e12, 900e9, 50e9),
    "mi300x": Gpu(192e9, 1307e12, 163.4e12, 448e9, 50e9),
}

MEASURED = "measured"
"""Name of no GPU: what this machine reaches is measured (``apps.plan.measuring``)."""
