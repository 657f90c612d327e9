"""Triton model `tokenizer_<model>`: TEXT (TEXT_PAIR) -> IDS, TYPES, LENGTHS, TRUNCATED, places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from samp_core import serving
from samp_core.meters import Meters


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self._meters = Meters.start(pb_utils, args)
        self._tokenizer = serving.Tokenizer.load(
            Path(__file__).resolve().parent, args, self._meters
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        model = self._tokenizer
        return serving.execute(
            pb_utils, requests, model.inputs, model.run, self._meters, model.admit
        )

    def finalize(self) -> None:
        self._meters.flush()
