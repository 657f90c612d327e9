"""`cpu`'s session: a whole encoder under one plan as one native call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from samp_kernels.cpu import _native
from samp_kernels.interface import (
    F32,
    GEMM_SITES,
    SITES,
    Array,
    Batch,
    EncoderConfig,
    KernelError,
    OutputKind,
    Weight,
    position_bias_of,
)

_ACTIVATIONS = {"gelu": 1, "gelu_tanh": 2, "tanh": 3, "relu": 4}
_OUTPUTS = {"first": 0, "mean": 1, "tokens": 2}
# The native encoder's timed work, in its order; `{}` is the layer.
_OPS = (
    ("embed_layernorm", "embeddings"),
    ("gemm", "layer.{}.qkv"),
    ("attention", "layer.{}.attention"),
    ("gemm", "layer.{}.out"),
    ("add_layernorm", "layer.{}.out"),
    ("gemm", "layer.{}.ffn_in"),
    ("gemm", "layer.{}.ffn_out"),
    ("add_layernorm", "layer.{}.ffn_out"),
    ("pool", "pool"),
    ("gemm", "classifier"),
)
_RAN = {0: "unknown", 1: "fp32", 2: "int8"}

Packs = dict[tuple[str, str, str], Any]


class NativeSession:
    """Weights are packed, or taken from `packs`, when it is made; buffers grow with the first
    batches. `threads` threads work on a pass and sleep between passes."""

    def __init__(
        self,
        backend: Any,
        config: EncoderConfig,
        tensors: Mapping[str, Array],
        plan: Any,
        *,
        threads: int,
        packs: Packs | None = None,
    ) -> None:
        self._layers = config.layers
        self._backend = backend
        self._packs: Packs = {} if packs is None else packs
        sizes = (config.layers, config.hidden, config.heads, config.ffn)
        act = _ACTIVATIONS[config.act]
        try:
            self._session = _native.Session(backend.level, *sizes, act, config.eps, threads)
        except ValueError as error:
            got, _, allowed = str(error).partition("; wanted ")
            raise KernelError("prepare", got, allowed) from None
        word, position, kind = (
            _floats(tensors[f"embeddings.{part}"]) for part in ("word", "position", "type")
        )
        gamma, beta = _norm(tensors, "embeddings.ln")
        self._session.set_embeddings(word, position, kind, gamma, beta)
        bias = position_bias_of(config, tensors)
        if bias is not None:
            self._session.set_position_bias(_floats(bias))
        for layer in range(config.layers):
            prefix = f"layer.{layer}"
            for site in GEMM_SITES:
                self._set_gemm(layer, site, tensors, plan, f"{prefix}.{site}")
            for norm in ("attention_ln", "output_ln"):
                self._session.set_norm(layer, norm, *_norm(tensors, f"{prefix}.{norm}"))
            scales = []
            for site, parts in (("scores", "qk"), ("context", "pv")):
                quantized = plan.precision(f"{prefix}.{site}") == "int8"
                for part in parts:
                    name = f"{prefix}.{site}.{part}_scale"
                    scales.append(_scalar(tensors, name) if quantized else 0.0)
            self._session.set_attention(layer, *scales)
        if "classifier.weight" in tensors:
            self._set_gemm(0, "classifier", tensors, plan, "classifier")
        self._failed = False

    def run(
        self, batch: Batch, *, output: OutputKind = "first", bit_layers: int | None = None
    ) -> F32:
        return self._pass(batch, output, timed=False)

    def profile(self, batch: Batch, output: OutputKind = "first") -> list[tuple[str, str, float]]:
        """Seconds of one pass by op. With several threads: an op's share of all their work, of
        the time that passed."""
        self._pass(batch, output, timed=True)
        return self._named(self._session.seconds())

    def profile_threads(
        self, batch: Batch, output: OutputKind = "first"
    ) -> tuple[float, list[list[tuple[str, str, float]]]]:
        """Seconds of one pass, and those that each thread worked on each op in it. What a thread
        lacks of the pass it waited, or something else had its core."""
        self._pass(batch, output, timed=True)
        passed, threads = self._session.busy()
        return passed, [self._named(seconds) for seconds in threads]

    def _named(self, seconds: list[float]) -> list[tuple[str, str, float]]:
        found = []
        for layer in range(self._layers):
            for place, (op, site) in enumerate(_OPS):
                taken = seconds[layer * len(_OPS) + place]
                if taken > 0.0:
                    found.append((op, site.format(layer), taken))
        return found

    def executed(self) -> dict[str, str]:
        if self._failed:
            return {}
        ran = self._session.executed()
        return {
            f"layer.{layer}.{site}": _RAN[ran[layer * len(SITES) + place]]
            for layer in range(self._layers)
            for place, site in enumerate(SITES)
            if any(ran)
        }

    def close(self) -> None:
        self._session.close()
        self._packs = {}

    def _pass(self, batch: Batch, output: OutputKind, *, timed: bool) -> F32:
        if output not in _OUTPUTS:
            raise KernelError("run", f"output {output!r}", ", ".join(_OUTPUTS))
        arrays = (batch.ids, batch.types, batch.positions, batch.cu_seqlens)
        ids, types, positions, cu = (np.ascontiguousarray(x, dtype=np.int32) for x in arrays)
        self._failed = True
        try:
            result = self._session.run(ids, types, positions, cu, _OUTPUTS[output], timed)
        except ValueError as error:
            got, _, allowed = str(error).partition("; allowed: ")
            raise KernelError("run", got, allowed or "a packed batch") from None
        self._failed = False
        return result

    def _set_gemm(
        self, layer: int, site: str, tensors: Mapping[str, Array], plan: Any, name: str
    ) -> None:
        scale = tensors.get(f"{name}.weight_scale")
        entry = plan.sites.get(name)
        recipe = entry.recipe if entry is not None else None
        granularity, input_scale = "", -1.0
        if scale is not None:
            per_token = recipe is not None and recipe.activation == "token"
            input_scale = 0.0 if per_token else _scalar(tensors, f"{name}.input_scale")
        if recipe is not None:
            granularity = recipe.weight
        outliers = tensors.get(f"{name}.outliers")
        if outliers is not None:
            granularity += f", {len(outliers)} outliers"
        key = (name, "fp32" if scale is None else "int8", granularity)
        if key not in self._packs:
            weight = Weight(
                tensors[f"{name}.weight"], scale, outliers, tensors.get(f"{name}.outlier_weight")
            )
            self._packs[key] = self._backend.pack(weight, key[1])
        packed = self._packs[key]
        empty = np.zeros(0, dtype=np.float32)
        try:
            self._session.set_gemm(
                layer,
                site,
                packed.native,
                _floats(tensors[f"{name}.bias"]),
                empty if packed.scale is None else packed.scale,
                input_scale,
                np.zeros(0, np.int32) if packed.outliers is None else packed.outliers,
                empty if packed.side is None else packed.side.ravel(),
            )
        except ValueError as error:
            allowed = "the shapes of its encoder.json"
            raise KernelError("prepare", f"{name}: {error}", allowed) from None


def _floats(x: Array) -> F32:
    return np.ascontiguousarray(x, dtype=np.float32)


def _norm(tensors: Mapping[str, Array], name: str) -> tuple[F32, F32]:
    return _floats(tensors[f"{name}.weight"]), _floats(tensors[f"{name}.bias"])


def _scalar(tensors: Mapping[str, Array], name: str) -> float:
    if name not in tensors:
        raise KernelError("prepare", f"no {name}", "a calibrated scale for every quantized site")
    return float(tensors[name].reshape(-1)[0])
