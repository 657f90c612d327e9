"""The encoder's forward pass, written once against kernels.Backend; it runs any plan.

One layer is six sites: qkv, scores, context, out, ffn_in, ffn_out. The output type of one op is
the input type of the next, so a quantized site's input is written quantized by the op before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from samp_kernels.interface import (
    F32,
    Array,
    Backend,
    Batch,
    EmbeddingTables,
    EncoderConfig,
    KernelError,
    LayerNorm,
    Out,
    OutputKind,
    Session,
    UnsupportedPrecision,
    Weight,
    position_bias_of,
)

from samp_core.errors import SampError
from samp_core.order import restore_order, round_up, sort_by_length
from samp_core.plan import HALVES, TOKEN_SITES, Plan

Observer = Callable[[str, Any], None]
"""Called with a site's full name and its float input, [tokens, features]; calibration listens."""

FORWARDS = 0
"""Encoder passes of this process: a build that finds everything cached must add none."""


@dataclass(frozen=True)
class LayerInput:
    """Where a pass stood before one of its layers; `LoopSession.run_from` goes on from there.

    hidden: the float [T, H] that the layer reads, as the backend holds it; batch, order: as sorted.
    """

    layer: int
    hidden: Any
    batch: Batch
    order: Array | None
    tokens: int


@dataclass(frozen=True)
class _Gemm:
    name: str
    packed: Any
    bias: Any
    input: Out


@dataclass(frozen=True)
class _Layer:
    qkv: _Gemm
    out: _Gemm
    ffn_in: _Gemm
    ffn_out: _Gemm
    attention_ln: LayerNorm
    output_ln: LayerNorm
    attention_precisions: tuple[str, str]
    attention_scales: Mapping[str, float]


def quantizable_sites(backend: Backend, precision: str = "int8") -> tuple[str, ...]:
    """The sites that this backend can run in int8 (or fp8) with static scales."""
    able = backend.capabilities()
    gemm = ("gemm", precision, "static") in able
    return tuple(
        site
        for site in ("qkv", "scores", "context", "out", "ffn_in", "ffn_out")
        if (f"attention.{site}", precision, "static") in able
        or (gemm and site not in ("scores", "context"))
    )


def halves(backend: Backend) -> tuple[str, ...]:
    """The floats beside fp32 that this backend runs at every site."""
    able = backend.capabilities()
    ops = ("gemm", "attention.scores", "attention.context")
    return tuple(p for p in HALVES if all((op, p, "") in able for op in ops))


def prepare(
    backend: Backend,
    config: EncoderConfig,
    tensors: Mapping[str, Array],
    plan: Plan,
    *,
    max_tokens: int | None = None,
    threads: int | None = None,
    packs: dict[tuple[str, str, str], Any] | None = None,
) -> Session:
    """A session for one plan; sessions that are given one `packs` share their packed weights.

    A backend with its own `prepare` (one native call, graphs) wins.

    Raises UnsupportedPrecision for a precision that the backend lacks, before any pass.
    """
    check_plan(backend, config, plan)
    own = getattr(backend, "prepare", None)
    if own is not None:
        return _Counted(
            own(config, tensors, plan, max_tokens=max_tokens, threads=threads, packs=packs)
        )
    return LoopSession(backend, config, tensors, plan, packs)


def check_plan(backend: Backend, config: EncoderConfig, plan: Plan) -> None:
    """Every site's precision against the backend's capabilities, every shape against the plan."""
    for key in ("layers", "hidden", "heads", "ffn"):
        if plan.config.get(key) != getattr(config, key):
            raise SampError(
                "plan_mismatch",
                f"a plan for {key} {plan.config.get(key)}",
                f"{key} {getattr(config, key)}, the checkpoint's",
                "plan again for this checkpoint: samp build --model FOLDER --data ROWS",
            )
    able = backend.capabilities()
    for site, entry in plan.sites.items():
        kind = site.rsplit(".", 1)[1]
        op = f"attention.{kind}" if kind in ("scores", "context") else "gemm"
        activation = ""
        if entry.precision != "fp32" and entry.recipe is not None:
            activation = entry.recipe.activation
        got = f"{site} {entry.precision} {activation}".strip()
        if (op, entry.precision, activation) not in able:
            kinds = {c[1:] for c in able if c[0] == op and c[1] not in ("residual", "outliers")}
            allowed = ", ".join(sorted(" ".join(kind).strip() for kind in kinds))
            raise UnsupportedPrecision(f"{backend.name} {op}", got, allowed)
        if activation == "token" and kind not in TOKEN_SITES:
            allowed = "a scale per token at qkv and ffn_in only"
            raise UnsupportedPrecision(f"{backend.name} {op}", got, allowed)
        outliers = entry.recipe.outliers if entry.recipe is not None else 0
        if outliers and ("gemm", "outliers", "") not in able:
            got = f"{site} {entry.precision} with {outliers} outliers"
            raise UnsupportedPrecision(f"{backend.name} {op}", got, "a recipe without outliers")


@dataclass(frozen=True)
class _Counted:
    """A backend's own session, whose passes count as everybody's do."""

    own: Any

    def run(
        self, batch: Batch, *, output: OutputKind = "first", bit_layers: int | None = None
    ) -> F32:
        _count()
        result: F32 = self.own.run(batch, output=output, bit_layers=bit_layers)
        return result

    def profile(self, batch: Batch, output: OutputKind = "first") -> list[tuple[str, str, float]]:
        _count()
        timings: list[tuple[str, str, float]] = self.own.profile(batch, output)
        return timings

    def executed(self) -> dict[str, str]:
        return dict(self.own.executed())

    def close(self) -> None:
        self.own.close()


class LoopSession:
    """The default session: a loop over the backend's ops."""

    def __init__(
        self,
        backend: Backend,
        config: EncoderConfig,
        tensors: Mapping[str, Array],
        plan: Plan,
        packs: dict[tuple[str, str, str], Any] | None = None,
    ) -> None:
        self._backend = backend
        self._packs = {} if packs is None else packs
        self._config = config
        self._executed: dict[str, str] = {}
        self._token_bucket = getattr(backend, "token_bucket", None)
        self._fuse_residual = ("gemm", "residual", "") in backend.capabilities()
        array = backend.array
        self._tables = EmbeddingTables(
            *(array(tensors[f"embeddings.{part}"]) for part in ("word", "position", "type"))
        )
        self._embedding_ln = self._layer_norm(tensors, "embeddings.ln")
        self._layers = [self._layer(tensors, plan, i) for i in range(config.layers)]
        bias = position_bias_of(config, tensors)
        self._position_bias = None if bias is None else array(bias)
        has_classifier = "classifier.weight" in tensors
        self._classifier = self._gemm(tensors, plan, "classifier") if has_classifier else None

    def run(
        self, batch: Batch, *, output: OutputKind = "first", bit_layers: int | None = None
    ) -> F32:
        return self._pass(batch, output)

    def observe(self, batch: Batch, output: OutputKind, observer: Observer) -> F32:
        """A pass in which `observer` sees the float input of every site. Float plans only."""
        return self._pass(batch, output, observer=observer)

    def layer_inputs(self, batch: Batch) -> list[LayerInput]:
        """One pass, and what each layer read in it: where another plan can go on."""
        kept: list[LayerInput] = []
        self._pass(batch, "tokens", kept=kept)
        return kept

    def run_from(self, start: LayerInput, output: OutputKind = "first") -> F32:
        """`run` from a layer on, with what another plan of this model computed before it.

        The same as a whole pass if both plans are the same in the layers before it.
        """
        _count()
        self._executed.clear()
        x = self._backend.quantize(start.hidden, self._layers[start.layer].qkv.input)
        return self._from_layer(start, start.hidden, x, output)

    def profile(self, batch: Batch, output: OutputKind = "first") -> list[tuple[str, str, float]]:
        timings: list[tuple[str, str, float]] = []
        self._pass(batch, output, timings=timings)
        return timings

    def executed(self) -> dict[str, str]:
        return dict(self._executed)

    def close(self) -> None:
        self._layers = []
        self._packs = {}

    def _layer_norm(self, tensors: Mapping[str, Array], name: str) -> LayerNorm:
        array = self._backend.array
        gamma, beta = array(tensors[f"{name}.weight"]), array(tensors[f"{name}.bias"])
        return LayerNorm(gamma, beta, self._config.eps)

    def _gemm(self, tensors: Mapping[str, Array], plan: Plan, name: str) -> _Gemm:
        precision = plan.precision(name)
        outliers = tensors.get(f"{name}.outliers")
        weight = Weight(
            tensors[f"{name}.weight"],
            tensors.get(f"{name}.weight_scale"),
            outliers,
            tensors.get(f"{name}.outlier_weight"),
        )
        entry = plan.sites.get(name)
        if precision in ("fp32", *HALVES):
            feed = Out(precision)
        elif entry is not None and entry.recipe is not None and entry.recipe.activation == "token":
            feed = Out(precision, "token")
        else:
            keep = () if outliers is None else tuple(outliers.tolist())
            feed = Out(precision, _scalar(tensors, f"{name}.input_scale"), keep)
        recipe = entry.recipe if entry is not None else None
        granularity = "" if recipe is None else str(recipe.weight)
        if outliers is not None:
            granularity += f", {len(outliers)} outliers"
        key = (name, precision, granularity)
        if key not in self._packs:
            self._packs[key] = self._backend.pack(weight, precision)
        return _Gemm(name, self._packs[key], self._backend.array(tensors[f"{name}.bias"]), feed)

    def _layer(self, tensors: Mapping[str, Array], plan: Plan, index: int) -> _Layer:
        prefix = f"layer.{index}"
        precisions = (plan.precision(f"{prefix}.scores"), plan.precision(f"{prefix}.context"))
        scales = {}
        for site, parts in (("scores", "qk"), ("context", "pv")):
            if plan.precision(f"{prefix}.{site}") == "int8":
                for part in parts:
                    scales[part] = _scalar(tensors, f"{prefix}.{site}.{part}_scale")
        return _Layer(
            qkv=self._gemm(tensors, plan, f"{prefix}.qkv"),
            out=self._gemm(tensors, plan, f"{prefix}.out"),
            ffn_in=self._gemm(tensors, plan, f"{prefix}.ffn_in"),
            ffn_out=self._gemm(tensors, plan, f"{prefix}.ffn_out"),
            attention_ln=self._layer_norm(tensors, f"{prefix}.attention_ln"),
            output_ln=self._layer_norm(tensors, f"{prefix}.output_ln"),
            attention_precisions=precisions,
            attention_scales=scales,
        )

    def _pass(
        self,
        batch: Batch,
        output: OutputKind,
        observer: Observer | None = None,
        timings: list[tuple[str, str, float]] | None = None,
        kept: list[LayerInput] | None = None,
    ) -> F32:
        _count()
        self._executed.clear()
        batch, order = sort_by_length(batch)
        backend = self._backend
        tokens = batch.tokens
        if observer is None and self._token_bucket is not None:
            batch = round_up(batch, self._token_bucket(tokens))
        timed = _timer(timings)
        residual, x = timed(
            "embed_layernorm",
            "embeddings",
            lambda: backend.embed_layernorm(
                batch.ids,
                batch.types,
                batch.positions,
                self._tables,
                self._embedding_ln,
                self._layers[0].qkv.input,
            ),
        )
        start = LayerInput(0, residual, batch, order, tokens)
        return self._from_layer(start, residual, x, output, observer, timed, kept)

    def _from_layer(
        self,
        start: LayerInput,
        residual: Any,
        x: Any,
        output: OutputKind,
        observer: Observer | None = None,
        timed: Callable[..., Any] | None = None,
        kept: list[LayerInput] | None = None,
    ) -> F32:
        """The layers from `start` on; x is the residual as the first of them wants it."""
        backend = self._backend
        timed = timed or _timer(None)
        see = observer if observer is not None else _ignore
        batch = start.batch
        cu = batch.cu_seqlens
        for index, layer in enumerate(self._layers):
            if index < start.layer:
                continue
            if kept is not None:
                kept.append(replace(start, layer=index, hidden=residual))
            last = index + 1 == len(self._layers)
            see(layer.qkv.name, x)
            qkv = self._run_gemm(timed, layer.qkv, x, Out())
            if observer is not None:
                observer(f"layer.{index}.attention", (qkv, cu))
            # Nothing mixes tokens after the last attention, so only pooled rows go on from there.
            early = last and output == "first"
            backend.ran = ()
            context = timed(
                "attention",
                f"layer.{index}.attention",
                lambda: backend.attention(
                    qkv,  # noqa: B023 (called at once)
                    cu,
                    batch.max_seqlen,
                    self._config.heads,
                    position_bias=self._position_bias,
                    precisions=layer.attention_precisions,  # noqa: B023
                    scales=layer.attention_scales,  # noqa: B023
                    out=Out() if early else layer.out.input,  # noqa: B023
                ),
            )
            self._record(f"layer.{index}.scores", 0)
            self._record(f"layer.{index}.context", 1)
            if early:
                residual = backend.pool(residual, cu, "first")
                context = backend.quantize(backend.pool(context, cu, "first"), layer.out.input)
            see(layer.out.name, context)
            residual, x = self._block(
                timed, layer.out, context, residual, layer.attention_ln, layer.ffn_in.input
            )
            see(layer.ffn_in.name, x)
            h = self._run_gemm(timed, layer.ffn_in, x, layer.ffn_out.input, act=self._config.act)
            see(layer.ffn_out.name, h)
            feed = Out() if last else self._layers[index + 1].qkv.input
            residual, x = self._block(timed, layer.ffn_out, h, residual, layer.output_ln, feed)
        if output == "mean":
            residual = backend.pool(residual, cu, "mean")
        elif output == "tokens":
            residual = residual[: start.tokens]
            if self._classifier is not None:
                residual = self._run_gemm(timed, self._classifier, residual, Out())
        y = backend.to_host(residual).astype(np.float32)
        return restore_order(y, cu, start.order, output)

    def _run_gemm(
        self, timed: Any, site: _Gemm, x: Any, out: Out, *, act: Any = None, residual: Any = None
    ) -> Any:
        self._backend.ran = ()
        y = timed(
            "gemm",
            site.name,
            lambda: self._backend.gemm(
                x, site.packed, site.bias, act=act, residual=residual, out=out
            ),
        )
        self._record(site.name, 0)
        return y

    def _block(
        self, timed: Any, site: _Gemm, x: Any, residual: Any, ln: LayerNorm, feed: Out
    ) -> tuple[Any, Any]:
        """gemm + residual + layer norm; the residual is added by whichever op can fuse it."""
        fused = residual if self._fuse_residual else None
        y = self._run_gemm(timed, site, x, Out(), residual=fused)
        rest = None if self._fuse_residual else residual
        pair: tuple[Any, Any] = timed(
            "add_layernorm",
            site.name,
            lambda: self._backend.add_layernorm(y, ln, residual=rest, out=feed),
        )
        return pair

    def _record(self, site: str, part: int) -> None:
        ran = self._backend.ran
        self._executed[site] = ran[part] if ran else "unknown"


def _count() -> None:
    global FORWARDS
    FORWARDS += 1


def _scalar(tensors: Mapping[str, Array], name: str) -> float:
    if name not in tensors:
        raise KernelError("prepare", f"no {name}", "a calibrated scale for every quantized site")
    return float(tensors[name].reshape(-1)[0])


def _ignore(site: str, value: Any) -> None:
    return None


def _timer(timings: list[tuple[str, str, float]] | None) -> Callable[..., Any]:
    def plain(op: str, site: str, call: Callable[[], Any]) -> Any:
        return call()

    def timed(op: str, site: str, call: Callable[[], Any]) -> Any:
        assert timings is not None
        begin = time.perf_counter()
        result = call()
        timings.append((op, site, time.perf_counter() - begin))
        return result

    return plain if timings is None else timed
