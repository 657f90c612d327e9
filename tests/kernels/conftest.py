"""torch announces that its quantized dtypes will go; kernels/onednn.py says why they are used."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:torch.quantize_per_tensor:UserWarning")
