#!/usr/bin/env bash
# Compile the CUDA kernels into an installed package, for every architecture:
#
#   deploy/compile_kernels.sh VENV/bin/python CONSTRAINTS [--arch sm_90a]...
#
# Its compiler, NVRTC, is installed aside and does not stay. PIP names the pip that is used.
set -euo pipefail

python=${1:?usage: deploy/compile_kernels.sh VENV/bin/python CONSTRAINTS [--arch sm_90a]...}
constraints=${2:?usage: deploy/compile_kernels.sh VENV/bin/python CONSTRAINTS [--arch sm_90a]...}
shift 2

compiler=$(mktemp -d)
trap 'rm -rf "$compiler"' EXIT
# The words of PIP are a command.
# shellcheck disable=SC2086
${PIP:-$python -m pip} install --no-cache-dir --disable-pip-version-check --quiet \
    --constraint "$constraints" --target "$compiler" nvidia-cuda-nvrtc
PYTHONPATH="$compiler" "$python" -m samp_kernels.cuda.build "$@"
