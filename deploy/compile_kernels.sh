#!/usr/bin/env bash
# Compile the CUDA kernels into an installed package, for every architecture:
#
#   deploy/compile_kernels.sh VENV/bin/python CONSTRAINTS [--arch sm_90a]...
#
# Its compiler, NVRTC and cuda.core, is installed aside and does not stay. PIP names the pip that is
# used.
set -euo pipefail

python=${1:?usage: deploy/compile_kernels.sh VENV/bin/python CONSTRAINTS [--arch sm_90a]...}
constraints=${2:?usage: deploy/compile_kernels.sh VENV/bin/python CONSTRAINTS [--arch sm_90a]...}
shift 2

# An environment: cuda.core looks for NVRTC in one of its own, not on PYTHONPATH.
compiler=$(mktemp -d)
trap 'rm -rf "$compiler"' EXIT
"$python" -m venv --without-pip "$compiler"
# The words of PIP are a command.
# shellcheck disable=SC2086
${PIP:-$python -m pip} --python "$compiler/bin/python" install --no-cache-dir \
    --disable-pip-version-check --quiet --constraint "$constraints" --no-deps \
    cuda-core cuda-bindings cuda-pathfinder nvidia-cuda-nvrtc
installed=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
PYTHONPATH="$installed" "$compiler/bin/python" -m samp_kernels.cuda.build "$@"
# What a server will look for, with the installed package alone.
"$python" -I - "$@" <<'END'
import sys

from samp_kernels.cuda.build import find_cubin
from samp_kernels.cuda.units import ARCHITECTURES, units_of

wanted = [word for word in sys.argv[1:] if word != "--arch"] or ARCHITECTURES
found = [find_cubin(unit, name) for name in wanted for unit in units_of(name)]
print(f"backend cuda: {len(found)} cubins for {', '.join(wanted)}")
END
