"""On a machine with an NVIDIA GPU; no kernel of ours runs there yet, and nothing claims so."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from samp_core.backends import BACKENDS, open_backend
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


def test_a_cuda_backend_is_refused_by_name() -> None:
    with pytest.raises(SampError, match=", ".join(BACKENDS)):
        open_backend("cuda")
