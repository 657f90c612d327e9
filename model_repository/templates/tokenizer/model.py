"""Triton model `tokenizer_<model>`: TEXT -> IDS, TYPES, LENGTHS, TRUNCATED."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from samp_core import serving


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self._tokenizer = serving.Tokenizer.load(Path(__file__).resolve().parent)

    def execute(self, requests: list[Any]) -> list[Any]:
        return serving.execute(pb_utils, requests, ("TEXT",), self._tokenizer.run)
