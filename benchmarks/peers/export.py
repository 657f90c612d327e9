"""Writes the peers' models of one checkpoint, fp32 and int8, in a process of its own.

    python benchmarks/peers/export.py openvino|onnxruntime CHECKPOINT SAMPLES.npz OUT

All come from transformers' BertModel with the checkpoint's weights, and calibrate on the same
samples. What cannot be made is named with its reason in OUT/failed.json; the rest goes on.
"""

from __future__ import annotations

import functools
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from samp_kernels.interface import Array

# (column of the benchmark, file, how it is made); the best arm of a column counts.
OPENVINO_FILES = (
    ("openvino_fp32", "fp32.xml", "fp32"),
    ("openvino_int8", "int8.xml", "nncf TRANSFORMER"),
    ("openvino_int8", "int8-plain.xml", "nncf TRANSFORMER, symmetric, no SmoothQuant"),
)
ONNX_FILES = (
    ("ort_fp32", "fp32.onnx", "plain"),
    ("ort_fp32", "fp32-fused.onnx", "transformer optimizer"),
    ("ort_int8", "int8-dynamic.onnx", "dynamic"),
    ("ort_int8", "int8-dynamic-fused.onnx", "dynamic, transformer optimizer"),
    ("ort_int8", "int8-static.onnx", "static"),
    ("ort_int8", "int8-static-fused.onnx", "static, transformer optimizer"),
)
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUT = "last_hidden_state"


def read_samples(path: Path) -> list[dict[str, Array]]:
    """One text a sample, int64 [1, s]."""
    with np.load(path) as stored:
        rows = [stored[name].astype(np.int64)[None] for name in stored.files]
    return [
        {"input_ids": row, "attention_mask": np.ones_like(row), "token_type_ids": row * 0}
        for row in rows
    ]


def traced(checkpoint: Path, attention: str) -> tuple[Any, tuple[Any, ...]]:
    """A module that returns the hidden states, and example inputs with padding in them."""
    import torch
    import transformers

    class HiddenStates(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = transformers.BertModel.from_pretrained(
                checkpoint, add_pooling_layer=False, attn_implementation=attention,
                dtype=torch.float32,
            )  # fmt: skip

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            return self.bert(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
            ).last_hidden_state

    ids = torch.ones(2, 9, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return HiddenStates().eval(), (ids, mask, torch.zeros_like(ids))


Steps = Iterator[tuple[str, Callable[[], None]]]
"""A file, and what makes it."""


def openvino(checkpoint: Path, samples: Path, out: Path) -> Steps:
    import nncf
    import openvino as ov
    from nncf.quantization.advanced_parameters import (
        AdvancedQuantizationParameters,
        AdvancedSmoothQuantParameters,
    )

    data = [tuple(sample[name] for name in INPUTS) for sample in read_samples(samples)]

    def fp32() -> None:
        module, example = traced(checkpoint, "sdpa")
        model = ov.convert_model(module, example_input=example)
        ov.save_model(model, out / "fp32.xml", compress_to_fp16=False)

    def int8(file: str, **more: Any) -> None:
        model = nncf.quantize(
            ov.Core().read_model(out / "fp32.xml"),
            nncf.Dataset(data),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(data),
            **more,
        )
        ov.save_model(model, out / file, compress_to_fp16=False)

    def plain() -> None:
        # SmoothQuant's multiplications stay in the graph, and cost 3 to 5%.
        none = AdvancedSmoothQuantParameters(matmul=-1, convolution=-1)
        advanced = AdvancedQuantizationParameters(smooth_quant_alphas=none)
        preset = nncf.QuantizationPreset.PERFORMANCE
        int8("int8-plain.xml", preset=preset, advanced_parameters=advanced)

    yield "fp32.xml", fp32
    yield "int8.xml", lambda: int8("int8.xml")
    yield "int8-plain.xml", plain


def onnxruntime(checkpoint: Path, samples: Path, out: Path) -> Steps:
    import onnx
    import torch
    from onnxruntime import quantization
    from onnxruntime.transformers import optimizer

    shape = json.loads((checkpoint / "config.json").read_text())

    def fp32() -> None:
        # The eager attention of the older exporter is the graph that ORT's tool recognizes.
        module, example = traced(checkpoint, "eager")
        axes = {name: {0: "batch", 1: "tokens"} for name in (*INPUTS, OUTPUT)}
        torch.onnx.export(
            module, example, str(out / "fp32.onnx"), input_names=list(INPUTS),
            output_names=[OUTPUT], dynamic_axes=axes, opset_version=17, dynamo=False,
        )  # fmt: skip

    def fused() -> None:
        model = optimizer.optimize_model(
            str(out / "fp32.onnx"), model_type="bert", num_heads=shape["num_attention_heads"],
            hidden_size=shape["hidden_size"], opt_level=0,
        )  # fmt: skip
        found = model.get_fused_operator_statistics()
        if found["Attention"] != shape["num_hidden_layers"]:
            raise RuntimeError(f"the transformer optimizer fused {found}")
        model.save_model_to_file(str(out / "fp32-fused.onnx"))

    class Samples(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rows = iter(read_samples(samples))

        def get_next(self) -> dict[str, Array] | None:
            return next(self._rows, None)

    # ORT's own fused operators have no shape inference; every unknown tensor here is a float.
    extra = {"DefaultTensorType": onnx.TensorProto.FLOAT}

    def dynamic(source: str, target: str) -> None:
        quantization.quantize_dynamic(
            out / source, out / target, per_channel=True,
            weight_type=quantization.QuantType.QInt8, extra_options=extra,
        )  # fmt: skip

    def static(source: str, target: str) -> None:
        quantization.quantize_static(
            out / source, out / target, Samples(), per_channel=True,
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Attention"], extra_options=extra,
        )  # fmt: skip

    yield "fp32.onnx", fp32
    yield "fp32-fused.onnx", fused
    for ending in ("", "-fused"):
        source = f"fp32{ending}.onnx"
        for kind, make in (("dynamic", dynamic), ("static", static)):
            target = f"int8-{kind}{ending}.onnx"
            yield target, functools.partial(make, source, target)


def main() -> None:
    tool, checkpoint, samples, out = sys.argv[1], *map(Path, sys.argv[2:5])
    warnings.filterwarnings("ignore")
    steps = {"openvino": openvino, "onnxruntime": onnxruntime}[tool]
    failed: dict[str, str] = {}
    for file, make in steps(checkpoint, samples, out):
        try:
            make()
        except Exception as error:
            failed[file] = (f"{type(error).__name__}: {error}".splitlines() or [""])[0][:200]
            (out / file).unlink(missing_ok=True)
    (out / "failed.json").write_text(json.dumps(failed), encoding="utf-8")


if __name__ == "__main__":
    main()
