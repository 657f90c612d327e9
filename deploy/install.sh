#!/usr/bin/env bash
# Install what the model processes need into a new virtual environment:
#
#   deploy/install.sh VENV
#
# The Dockerfile and CI run these same steps. PYTHON names the interpreter (its pip is used),
# TORCH_INDEX the address of PyTorch's index of CPU wheels, for a torch without CUDA. A C++ compiler
# builds the native CPU kernels; SAMP_NATIVE=require lets the install fail without them. SAMP_GPU=1
# adds CuPy and the CUDA kernels, compiled for every architecture or those of SAMP_ARCHITECTURES; no
# GPU is needed for that.
set -euo pipefail

venv=${1:?usage: deploy/install.sh VENV}
python=${PYTHON:-python3}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# A copy, because building a package writes into its source folder, which may be read-only.
source=$(mktemp -d)
trap 'rm -rf "$source"' EXIT
mkdir "$source/model_repository"
cp -R "$root"/{pyproject.toml,setup.py,README.md,LICENSE,samp_core,kernels,client,loadtest} "$source"
cp -R "$root/model_repository/templates" "$source/model_repository"
# Beside a Triton of its own release the stub takes numpy 2; the rest is as tested.
grep -v '^numpy==' "$root/constraints.txt" > "$source/constraints.txt"

"$python" -m venv --without-pip "$venv"
"$python" -m pip --python "$venv/bin/python" install --no-cache-dir --disable-pip-version-check \
    --quiet --constraint "$source/constraints.txt" \
    ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch==2.13.0 \
    "$source[serve${SAMP_GPU:+,gpu}]"
if [ -n "${SAMP_GPU:-}" ]; then
    wanted=()
    for name in ${SAMP_ARCHITECTURES:-}; do wanted+=(--arch "$name"); done
    PIP="$python -m pip" "$root/deploy/compile_kernels.sh" \
        "$venv/bin/python" "$source/constraints.txt" "${wanted[@]}"
    # CuPy must load where there is no driver, too: a CPU tier of the same image serves there.
    "$venv/bin/python" -I -c 'from samp_kernels.cuda import load_cupy, missing
print("backend cuda: cupy", load_cupy().__version__, missing() or "and a GPU")'
fi
"$venv/bin/python" -I -c 'import samp_core.serving, samp_core.text, samp_core.heads'
"$venv/bin/python" -I -c 'import samp_core.encoder, samp_kernels.onednn, samp_templates'
"$venv/bin/python" -I -c 'from samp_kernels.cpu import state; print("backend cpu:", state())'
echo "installed into $venv"
