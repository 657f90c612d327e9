#!/usr/bin/env bash
# Install the client alone into a new virtual environment, and say what that costs:
#
#   deploy/install_client.sh VENV
#
# PYTHON names the interpreter. Fails if the client takes 0.3 s to import, if something heavy came
# along, or if either protocol cannot be used. CI runs it.
set -euo pipefail

venv=${1:?usage: deploy/install_client.sh VENV}
python=${PYTHON:-python3}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

source=$(mktemp -d)
trap 'rm -rf "$source"' EXIT
mkdir "$source/model_repository"
cp -R "$root"/{pyproject.toml,setup.py,README.md,LICENSE,samp_core,kernels,client,loadtest} "$source"
cp -R "$root/model_repository/templates" "$source/model_repository"

"$python" -m venv --without-pip "$venv"
begun=$SECONDS
SAMP_NATIVE=0 "$python" -m pip --python "$venv/bin/python" install --no-cache-dir \
    --disable-pip-version-check --quiet "$source"
echo "installed in $((SECONDS - begun)) s, $(du -sm "$venv" | cut -f1) MB"

# The quickest of five: other work on the machine only adds.
for _ in 1 2 3 4 5; do
    "$venv/bin/python" -I -c 'import time
begun = time.perf_counter()
import samp_client
print(time.perf_counter() - begun)'
done | sort -n | awk 'NR == 1 { printf "import samp_client: %.3f s\n", $1; exit !($1 < 0.3) }'

"$venv/bin/python" -I - <<'END'
from importlib.metadata import distributions

import samp_client

names = sorted(found.metadata["Name"].lower() for found in distributions())
heavy = {"torch", "transformers", "tokenizers", "scipy", "pydantic", "typer"} & set(names)
assert not heavy, f"not the client's: {heavy}"
print(f"{len(names)} packages: {' '.join(names)}")
for protocol in ("grpc", "http"):
    with samp_client.connect("127.0.0.1:9", protocol, timeout_s=5.0) as client:
        try:
            client.tiers()
        except samp_client.Unavailable:
            print(f"{protocol}: works")
END

# The command needs more, and says so in a line.
{ "$venv/bin/samp" status 2>&1 || true; } | grep "samp-triton\[build\]"
