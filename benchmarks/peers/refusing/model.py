"""A Triton model that refuses whatever comes, at once and unread; `hold`: keeps it instead.

The least that a refusal by any Python model costs, and a way to fill Triton's own queue.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        hold = parameters.get("hold")
        self._hold = Path(hold["string_value"]) if hold else None

    def execute(self, requests: list[Any]) -> list[Any]:
        while self._hold is not None and self._hold.exists():
            time.sleep(0.05)
        # Each its own error: Triton 24.10 crashes on one that two responses share.
        refused = pb_utils.TritonError.UNAVAILABLE
        errors = [pb_utils.TritonError("refused", refused) for _ in requests]
        return [pb_utils.InferenceResponse(error=error) for error in errors]
