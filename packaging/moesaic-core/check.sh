#!/bin/sh
# Builds moesaic-core, installs it into an empty virtual environment, and runs the engine's tests there. From the root:
#   sh packaging/moesaic-core/check.sh [TORCH VERSION] [PIP OPTION...]
# PYTHON names the interpreter (default: python3). The tests that need benchmarks/ are left out.
set -eu
torch=torch${1:+==$1}
[ $# -eq 0 ] || shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
bin=$work/venv/bin
"$bin/pip" wheel --quiet --no-deps --wheel-dir "$work" packaging/moesaic-core
"$bin/pip" install --quiet "$@" "$work"/moesaic_core-*.whl "$torch"
"$bin/pip" check
mkdir "$work/tests"
cp -r tests/conftest.py tests/core tests/support "$work/tests"
cp -r docs "$work"
cd "$work"  # away from the tree, whose core would be imported
"$bin/python" -c '
import core, torch
print("torch", torch.__version__, "with", core.__file__)
layer = core.MoEConfig(num_experts=8, router=core.TokenChoice(top_k=2)).build(dim=64)
with core.record(layer) as tape:
    y = layer(torch.randn(4, 16, 64))
(y.square().mean() + core.aux_loss(tape)).backward()
'
"$bin/pip" install --quiet pytest numpy scipy  # both for the tests: SciPy has answers, Triton is interpreted by NumPy
printf '[pytest]\npythonpath = tests/support\nmarkers =\n    slow: long\n    gpu: needs CUDA\n' >pytest.ini
others=$(grep -rlE '^ *(from|import) benchmarks' tests/core | sed 's/^/--ignore=/')
# shellcheck disable=SC2086
OMP_NUM_THREADS=1 "$bin/python" -m pytest -q -m "not slow and not gpu" --import-mode=importlib tests/core $others
