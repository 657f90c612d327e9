"""The encoder of a build, whose batches wait as long as the file of parameter `hold` exists.

Its own code lies beside it as encoder.py.
"""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location("samp_encoder_model", _HERE / "encoder.py")
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        self._hold = Path(parameters["hold"]["string_value"])
        self._real = _module.TritonPythonModel()
        self._real.initialize(args)

    def execute(self, requests: list[Any]) -> list[Any]:
        if self._hold.exists():
            self._real._encoder.progress.begin(0)  # a batch is under way: its queue is not empty
        while self._hold.exists():
            time.sleep(0.05)
        return self._real.execute(requests)

    def finalize(self) -> None:
        self._real.finalize()
