"""On a machine with an NVIDIA GPU. No kernel of ours has run on one yet: docs/gpu.md."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from samp_kernels.cuda import missing, not_automatic

from samp_core import gpu_proof
from samp_core.backends import choose_backend, open_backend
from samp_core.doctor import examine
from samp_core.errors import SampError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs an NVIDIA GPU"),
]


def test_doctor_names_the_gpu() -> None:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    name = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[
        0
    ]
    found = " ".join(check.found for check in examine())
    assert name in found


def test_the_cuda_backend_opens_or_says_what_it_lacks() -> None:
    why = missing()
    if why:
        with pytest.raises(SampError, match="backend cuda"):
            open_backend("cuda")
    else:
        assert open_backend("cuda").name == "cuda"
    assert (choose_backend("auto") == "cuda") == (not_automatic() == "")


def test_the_short_check_passes_within_its_limit() -> None:
    if missing():
        pytest.skip(missing())
    wrong, facts = gpu_proof.check(gpu_proof.LIMIT_S)
    assert wrong == ""
    assert facts["checks"] > 60
