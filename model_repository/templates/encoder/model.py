"""Triton model `encoder_<model>_<tier>`: IDS, TYPES, LENGTHS -> FEATURE, under one plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from samp_core import serving


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self._encoder = serving.Encoder.load(
            Path(__file__).resolve().parent, serving.parameters(args), pb_utils.Logger.log_info
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        inputs = ("IDS", "TYPES", "LENGTHS")
        return serving.execute(pb_utils, requests, inputs, self._encoder.run)

    def finalize(self) -> None:
        self._encoder.close()
