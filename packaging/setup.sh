#!/bin/sh
# Makes .venv and installs the project into it. Run by `make setup`, from the root of the tree:
#   sh packaging/setup.sh PYTHON PARTS [PIP OPTION...]
# PYTHON  the interpreter for .venv, or "auto": the first one on PATH that fits
# PARTS   "cuda", "cpu", or "auto": cuda where nvidia-smi lists a GPU
#
# Two marks lie in .venv. `unfinished` is there while a run lasts, so that a venv whose run was killed is made anew; pip
# leaves a venv whole when it reports an error, so then only `ready` is missing and the next run goes on from there.
# `ready` is written last, and make compares it with the files that say what to install.
set -eu

python=$1 parts=$2
shift 2
venv=.venv
on_error=:  # what else to do when a step fails

say() { printf '%s\n' "$*"; }
die() { printf 'set-up: %s\n' "$*" >&2; exit 1; }

# step TEXT COMMAND...: one line: what is done, then the seconds that it took
step() {
    text=$1; shift
    printf '%-72s' "$text ..."
    begin=$(date +%s)
    "$@" || { printf '\n'; $on_error; die "stopped at \"$text\": the lines above say why"; }
    printf '%4d s\n' "$(($(date +%s) - begin))"
}

# 3.11 is the project's lower bound, 3.14 the last one that torch 2.13 and fbgemm 1.8 have wheels for.
# ensurepip is missing where a distribution splits it off (Debian's python3-venv): such a Python cannot make a venv.
fits() {
    command -v "$1" >/dev/null 2>&1 &&
        "$1" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null
}

find_python() {
    if [ "$python" != auto ]; then
        fits "$python" || die "PYTHON=$python is not a Python 3.11 to 3.14 with its venv module"
        return
    fi
    for python in python3 python3.11 python3.12 python3.13 python3.14 python; do
        if fits "$python"; then return; fi
    done
    die "no Python 3.11 to 3.14 with its venv module on PATH; name one: make setup PYTHON=/path/to/python3.11"
}

# True if pip would take a torch that brings CUDA libraries. Asks for torch's metadata alone, which is a second's work.
torch_brings_cuda() {
    "$venv/bin/python" -c 'import torch' 2>/dev/null && return 1
    "$venv/bin/python" -m pip install --quiet --dry-run --no-deps --report - "$@" "torch>=2.13,<2.14" 2>/dev/null |
        grep -q '^ *"nvidia-'
}

install() { "$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check "$@"; }
check() { report=$("$venv/bin/python" -m pip check 2>&1) || { printf '\n%s\n' "$report"; return 1; }; }

case $parts in
    cpu | cuda) ;;
    auto) if nvidia-smi -L 2>/dev/null | grep -q GPU; then parts=cuda; else parts=cpu; fi ;;
    *) die "PARTS=$parts is none of auto, cpu, cuda" ;;
esac

begin_all=$(date +%s)
if [ -e "$venv/unfinished" ] || { [ -e "$venv" ] && ! fits "$venv/bin/python"; }; then
    step "Removing a $venv that is unfinished or broken" rm -rf "$venv"
fi
if [ ! -e "$venv" ]; then
    find_python
    mkdir "$venv"
    : >"$venv/unfinished"
    step "Making $venv with $("$python" --version)" "$python" -m venv "$venv"
fi
: >"$venv/unfinished"
rm -f "$venv/ready"
on_error="rm -f $venv/unfinished"

if [ "$parts" = cuda ]; then
    step "Installing moesaic with the CUDA parts" install "$@" -e ".[dev]"
else
    if [ "$(uname -s)" = Linux ] && torch_brings_cuda "$@"; then
        say "Note: no GPU here, yet the package index offers a torch that brings CUDA libraries, about 3 GB. It works"
        say "      on a CPU too. To get the small CPU build instead, stop now (Ctrl-C) and name an index of CPU wheels:"
        say "      make setup PIP_ARGS='--extra-index-url URL'"
    fi
    step "Installing moesaic with the CPU parts" \
        install "$@" ./packaging/fbgemm-gpu-cpu -e ".[dev]"
fi
step "Checking that the packages fit together (pip check)" check
rm -f "$venv/unfinished"
: >"$venv/ready"
say "Set-up done in $(($(date +%s) - begin_all)) s: source $venv/bin/activate, then moesaic --help"
