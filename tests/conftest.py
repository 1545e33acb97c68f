"""Set before any test is read, and so before anything imports Triton."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # Triton's kernels then run on the CPU, one program after the other.
    os.environ["TRITON_INTERPRET"] = "1"
