"""The float encoder once more, in plain torch, so that a loss can be differentiated through it.

Used while building only: what a plan's sites cost to first and second order comes from one
forward and two backward passes. `encoder.py` is what runs plans.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from samp_kernels.interface import LARGEST, Array, Batch, EncoderConfig, OutputKind

Tensor = torch.Tensor
Tensors = Mapping[str, Tensor]

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class Tap:
    """What one node reads and writes: a GEMM's x and x W^T + b, or attention's qkv and context."""

    name: str
    x: Tensor
    y: Tensor


def as_tensors(arrays: Mapping[str, Array]) -> dict[str, Tensor]:
    """Host arrays as float tensors, without a copy where they are float already."""
    return {
        name: torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
        for name, array in arrays.items()
    }


def forward(
    tensors: Tensors, config: EncoderConfig, batch: Batch, output: OutputKind
) -> tuple[Tensor, list[Tap]]:
    """The feature, [B, H] or for tokens [T, H], and the tap of every node in order."""
    ids, types, positions = (
        torch.from_numpy(index.astype(np.int64))
        for index in (batch.ids, batch.types, batch.positions)
    )
    embedded = tensors["embeddings.word"][ids]
    embedded = embedded + tensors["embeddings.position"][positions]
    embedded = embedded + tensors["embeddings.type"][types]
    hidden = _layer_norm(tensors, "embeddings.ln", embedded, config.eps).requires_grad_()
    bounds = batch.cu_seqlens.tolist()
    act = _ACTIVATIONS[config.act]
    taps: list[Tap] = []

    def gemm(name: str, x: Tensor) -> Tensor:
        y = F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])
        taps.append(Tap(name, x, y))
        return y

    for layer in range(config.layers):
        prefix = f"layer.{layer}"
        qkv = gemm(f"{prefix}.qkv", hidden)
        context = attention(qkv, bounds, config.heads, bias=tensors.get("position_bias"))
        taps.append(Tap(f"{prefix}.attention", qkv, context))
        hidden = _layer_norm(
            tensors, f"{prefix}.attention_ln", gemm(f"{prefix}.out", context) + hidden, config.eps
        )
        inner = act(gemm(f"{prefix}.ffn_in", hidden))
        hidden = _layer_norm(
            tensors, f"{prefix}.output_ln", gemm(f"{prefix}.ffn_out", inner) + hidden, config.eps
        )
    if output == "first":
        return hidden[torch.tensor(bounds[:-1])], taps
    if output == "mean":
        lengths = np.diff(batch.cu_seqlens).tolist()
        return torch.stack([part.mean(0) for part in torch.split(hidden, lengths)]), taps
    return hidden, taps


def attention(
    qkv: Tensor,
    bounds: list[int],
    heads: int,
    rounded: Callable[[str, Tensor], Tensor] = lambda part, x: x,
    bias: Tensor | None = None,
) -> Tensor:
    """softmax(Q K^T / sqrt(d) + bias) V in each sequence; `rounded` is laid on q, k, p and v.

    bias: [heads, 2 n - 1] by distance, as in kernels/interface.py.
    """
    hidden = qkv.shape[1] // 3
    dim = hidden // heads
    q, k, v = (
        rounded(part, x) for part, x in zip("qkv", torch.split(qkv, hidden, dim=1), strict=True)
    )  # fmt: skip
    pieces = []
    for begin, end in itertools.pairwise(bounds):
        a, b, c = (x[begin:end].view(-1, heads, dim).transpose(0, 1) for x in (q, k, v))
        scores = a @ b.transpose(1, 2) / dim**0.5
        if bias is not None:
            place = torch.arange(end - begin)
            scores = scores + bias[:, bias.shape[1] // 2 + place[None] - place[:, None]]
        p = rounded("p", torch.softmax(scores, dim=-1))
        pieces.append((p @ c).transpose(0, 1).reshape(end - begin, hidden))
    return torch.cat(pieces)


def head_logits(weights: Tensors, feature: Tensor) -> Tensor | None:
    """The heads of pooled.py, and classifier(x) alone; None for another head."""
    known = {"classifier.weight", "classifier.bias"}
    if not known <= set(weights):
        return None
    for name, act in (("pooler", torch.tanh), ("pre_classifier", torch.relu)):
        layer = (f"{name}.weight", f"{name}.bias")
        if set(weights) == known | set(layer):
            feature = act(F.linear(feature, *(weights[part] for part in layer)))
            known |= set(layer)
    if set(weights) != known:
        return None
    return F.linear(feature, weights["classifier.weight"], weights["classifier.bias"])


def rounded_to_int8(x: Tensor, scale: float) -> Tensor:
    """scale * clip(rint(x / scale), -127, 127)"""
    return torch.clamp(torch.round(x / scale), -127, 127) * scale


def rounded_to_fp8(x: Tensor, scale: float) -> Tensor:
    """scale * the e4m3 number nearest to x / scale, at most 448"""
    near = torch.clamp(x / scale, -LARGEST["fp8"], LARGEST["fp8"])
    return near.to(torch.float8_e4m3fn).to(x.dtype) * scale


ROUNDED = {"int8": rounded_to_int8, "fp8": rounded_to_fp8}


def _layer_norm(tensors: Tensors, name: str, x: Tensor, eps: float) -> Any:
    return F.layer_norm(
        x, (x.shape[-1],), tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps
    )  # fmt: skip
