"""OpenVINO on the CPU: fp32, nncf's int8, and what it does of itself where the CPU has bf16."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peers.export import OPENVINO_FILES
from peers.padded import Arm, Call
from samp_kernels.interface import Array

PACKAGES = ("openvino", "nncf")


def arms(folder: Path, threads: int) -> Iterator[Arm]:
    """Arms over the models that peers/export.py wrote, each for any shape or fixed to one.

    Left to itself OpenVINO computes floats in bf16 where the CPU can: that is a column of its own
    for the float model, and an arm like any other for the int8 ones.
    """
    import openvino as ov

    core = ov.Core()
    tuned: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")

    def arm(column: str, path: Path, name: str, hint: str, shape: Sequence[int] | None) -> Arm:
        model = core.read_model(path)
        if shape is not None:
            model.reshape({port: list(shape) for port in model.inputs})
        config = {**tuned, "INFERENCE_PRECISION_HINT": hint}
        request = core.compile_model(model, "CPU", config).create_infer_request()
        if shape is not None:
            return Arm(column, f"{name}, static shape", _binder(request))
        return Arm(
            column, name, _binder(request), lambda fixed: arm(column, path, name, hint, fixed)
        )

    for column, file, recipe in OPENVINO_FILES:
        path = folder / file
        for hint in ("f32", "bf16") if has_bf16 else ("f32",):
            if path.is_file():
                its = "openvino_bf16" if column == "openvino_fp32" and hint == "bf16" else column
                yield arm(its, path, f"{recipe}, floats {hint}", hint, None)


def _binder(request: Any) -> Any:
    def bind(ids: Array, mask: Array, types: Array) -> Call:
        inputs = [ids, mask, types]

        def call() -> Array:
            states: Array = request.infer(inputs, share_inputs=True, share_outputs=True)[0]
            return states

        return call

    return bind
