"""Triton model `encoder_<model>_<tier>`: IDS, TYPES, LENGTHS -> FEATURE, under one plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from samp_core import admission, serving
from samp_core.meters import Meters
from samp_core.model_config import gpu_of


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        parameters = serving.parameters(args)
        self._meters = Meters.start(pb_utils, args, parameters["tier"])
        folder = Path(__file__).resolve().parent
        self._encoder = serving.Encoder.load(
            folder,
            parameters,
            pb_utils.Logger.log_info,
            self._meters,
            admission.progress(args),
            gpu_of(args),
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        inputs = ("IDS", "TYPES", "LENGTHS")
        return serving.execute(pb_utils, requests, inputs, self._encoder.run, self._meters)

    def finalize(self) -> None:
        self._meters.flush()
        self._encoder.close()
