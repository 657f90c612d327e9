"""`cuda`'s session: a whole encoder under one plan, seven launches a layer, one graph a bucket.

A batch is rounded up to a bucket of tokens and one of sequences, so that few graphs serve all
batches. Ids, bounds and the attention's work list cross to the device in one copy; the results
come back in one. The last layer of `first` computes each sequence's first row only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from samp_kernels.cuda import ops
from samp_kernels.cuda.launcher import Launch
from samp_kernels.cuda.ops import Matrix, Packed, Target, padded
from samp_kernels.cuda.room import HALVES, Room, stream_of
from samp_kernels.interface import (
    F32,
    GEMM_SITES,
    SITES,
    Array,
    Batch,
    EmbeddingTables,
    EncoderConfig,
    KernelError,
    LayerNorm,
    OutputKind,
    Weight,
    check_embedding,
)

OUTPUTS = ("first", "mean", "tokens")
SEQUENCES = (8, 64, 512, 4096, 32768)
"""Buckets of sequences; a server's batch has at most 64."""

Packs = dict[tuple[str, str, str], Any]


def token_buckets(most: int) -> tuple[int, ...]:
    """From 16 on in steps of an eighth to a quarter of their size, none below 16."""
    found, step = [16], 16
    while found[-1] < most:
        found.append(found[-1] + step)
        if found[-1] >= 8 * step:
            step *= 2
    return tuple(found)


def round_to(buckets: tuple[int, ...], size: int) -> int:
    return next((bucket for bucket in buckets if bucket >= size), size)


@dataclass(frozen=True)
class _Site:
    """One GEMM: its weight, and what it wants of the op before it."""

    name: str
    packed: Packed
    bias: Matrix
    kind: str
    scale: float | None
    """Of an int8 input; None: a scale for each token."""
    column_scale: Matrix | None


@dataclass(frozen=True)
class _Layer:
    qkv: _Site
    out: _Site
    ffn_in: _Site
    ffn_out: _Site
    attention_ln: LayerNorm
    output_ln: LayerNorm
    precisions: tuple[str, str]
    scales: Mapping[str, float]


@dataclass(frozen=True)
class _Inputs:
    """Where in one int32 block the parts of a batch of this size stand."""

    tokens: int
    sequences: int

    @property
    def blocks(self) -> int:
        """Attention blocks, at most: each sequence may end in one that is not full."""
        return self.tokens // ops.QUERIES + self.sequences

    @property
    def places(self) -> tuple[int, int, int, int, int, int, int]:
        """ids, types, positions, bounds, first rows, work list, end."""
        t, b = self.tokens, self.sequences
        work = 3 * t + 2 * b + 1
        return (0, t, 2 * t, 3 * t, 3 * t + b + 1, work, work + 2 * self.blocks)

    def write(self, block: Array, batch: Batch) -> None:
        ids, types, positions, bounds, firsts, work, end = self.places
        block[:bounds] = 0
        for begin, part in ((ids, batch.ids), (types, batch.types), (positions, batch.positions)):
            block[begin : begin + batch.tokens] = part
        count = batch.sequences
        block[bounds:firsts] = batch.cu_seqlens[-1]
        block[bounds : bounds + count + 1] = batch.cu_seqlens
        block[firsts:work] = 0
        block[firsts : firsts + count] = batch.cu_seqlens[:-1]
        tiles = ops.attention_tiles(batch.cu_seqlens).reshape(-1)
        block[work:end] = -1
        block[work : work + len(tiles)] = tiles


@dataclass(frozen=True)
class _Program:
    """All launches of one bucket, and where the result stands."""

    launches: tuple[Launch, ...]
    replay: Callable[[], None]
    result: Matrix


class CudaSession:
    """Not thread-safe. Buffers are made for `max_tokens`; a larger batch makes larger ones."""

    def __init__(
        self,
        backend: Any,
        config: EncoderConfig,
        tensors: Mapping[str, Array],
        plan: Any,
        *,
        max_tokens: int,
        packs: Packs | None = None,
        stream: str | None = None,
    ) -> None:
        """`stream`: kind of the residual stream; by default fp16 or bf16 where no site is fp32."""
        self._backend = backend
        self._launcher = backend.launcher
        self._config = config
        self._packs: Packs = {} if packs is None else packs
        array = backend.array
        self._tables = EmbeddingTables(
            *(self._table(tensors, part) for part in ("word", "position", "type"))
        )
        self._table_sizes = EmbeddingTables(
            *(tensors[f"embeddings.{part}"] for part in ("word", "position", "type"))
        )
        self._embedding_ln = self._norm(tensors, "embeddings.ln")
        precisions = {plan.precision(f"layer.{i}.{s}") for i in range(config.layers) for s in SITES}
        self._stream = stream or stream_of(precisions)
        self._layers = [self._layer(tensors, plan, i) for i in range(config.layers)]
        self._bias = None
        if getattr(config, "position_bias", False):
            self._bias = array(tensors["position_bias"])
        has_classifier = "classifier.weight" in tensors
        self._classifier = self._site(tensors, plan, "classifier") if has_classifier else None
        self._executed: dict[str, str] = {}
        self._programs: dict[tuple[int, int, str], _Program] = {}
        self._make_room(max(16, max_tokens))
        # A search shares weights among many plans, each run on few shapes: its graphs are made when
        # they are met, as emulated programs are. A server's are made at start.
        if packs is None and hasattr(self._launcher, "stream"):
            self._capture_all()

    def run(
        self, batch: Batch, *, output: OutputKind = "first", bit_layers: int | None = None
    ) -> F32:
        program = self._send(batch, output)
        program.replay()
        self._note(program)
        return self._receive(program, batch, output)

    def profile(self, batch: Batch, output: OutputKind = "first") -> list[tuple[str, str, float]]:
        """Seconds of each launch on the device; attention stands under the layer's name."""
        program = self._send(batch, output)
        seconds = [self._launcher.seconds(one) for one in program.launches]
        self._note(program)
        self._receive(program, batch, output)
        return [(one.op, one.site, s) for one, s in zip(program.launches, seconds, strict=True)]

    def executed(self) -> dict[str, str]:
        return dict(self._executed)

    def launches(self, batch: Batch, output: OutputKind = "first") -> tuple[Launch, ...]:
        """What a pass over this batch launches, in order."""
        return self._send(batch, output).launches

    def run_eagerly(self, batch: Batch, output: OutputKind = "first") -> F32:
        """`run` launch by launch, without the graph."""
        program = self._send(batch, output)
        for one in program.launches:
            self._launcher.launch(one)
        return self._receive(program, batch, output)

    def close(self) -> None:
        self._programs.clear()
        self._packs = {}
        self._layers = []

    # Weights.

    def _table(self, tensors: Mapping[str, Array], part: str) -> Matrix:
        key = (f"embeddings.{part}", "fp32", "")
        if key not in self._packs:
            self._packs[key] = self._backend.array(tensors[f"embeddings.{part}"])
        table: Matrix = self._packs[key]
        return table

    def _norm(self, tensors: Mapping[str, Array], name: str) -> LayerNorm:
        array = self._backend.array
        gamma, beta = array(tensors[f"{name}.weight"]), array(tensors[f"{name}.bias"])
        return LayerNorm(gamma, beta, self._config.eps)

    def _site(self, tensors: Mapping[str, Array], plan: Any, name: str) -> _Site:
        precision = plan.precision(name)
        entry = plan.sites.get(name)
        recipe = entry.recipe if entry is not None else None
        key = (name, precision, "" if recipe is None else str(recipe.weight))
        if key not in self._packs:
            weight = Weight(
                tensors[f"{name}.weight"],
                tensors.get(f"{name}.weight_scale"),
                tensors.get(f"{name}.outliers"),
                tensors.get(f"{name}.outlier_weight"),
            )
            self._packs[key] = self._backend.pack(weight, precision)
        packed: Packed = self._packs[key]
        bias = self._backend.array(tensors[f"{name}.bias"])
        scale, columns = None, None
        if packed.scale is not None:
            if recipe is not None and recipe.activation == "token":
                factor = 1.0
            else:
                factor = scale = _scalar(tensors, f"{name}.input_scale")
            columns = self._backend.array(packed.scale * np.float32(factor))
        return _Site(name, packed, bias, precision, scale, columns)

    def _layer(self, tensors: Mapping[str, Array], plan: Any, index: int) -> _Layer:
        prefix = f"layer.{index}"
        precisions = (plan.precision(f"{prefix}.scores"), plan.precision(f"{prefix}.context"))
        ops.check_attention_kind(precisions, self._config.head_dim)
        scales = {
            part: _scalar(tensors, f"{prefix}.{site}.{part}_scale")
            for site, parts, precision in zip(
                ("scores", "context"), ("qk", "pv"), precisions, strict=True
            )
            for part in parts
            if precision == "int8"
        }
        qkv, out, ffn_in, ffn_out = (
            self._site(tensors, plan, f"{prefix}.{site}") for site in GEMM_SITES
        )
        return _Layer(
            qkv,
            out,
            ffn_in,
            ffn_out,
            self._norm(tensors, f"{prefix}.attention_ln"),
            self._norm(tensors, f"{prefix}.output_ln"),
            precisions,
            scales,
        )

    # Buffers and programs.

    def _make_room(self, tokens: int) -> None:
        """Buffers for batches of up to `tokens` tokens; every graph of smaller ones is void."""
        self._programs.clear()
        self._buckets = token_buckets(tokens)
        self._capacity = rows = self._buckets[-1]
        most = _Inputs(rows, round_to(SEQUENCES, min(rows, SEQUENCES[-1])))
        classes = self._classifier.packed.shape[0] if self._classifier is not None else 0
        key = ("room", f"{rows}", f"{classes}")
        if key not in self._packs:
            size = most.places[-1]
            self._packs[key] = Room(self._backend, self._config, rows, size, classes)
        self._room: Room = self._packs[key]

    def _capture_all(self) -> None:
        for tokens in self._buckets:
            for sequences in SEQUENCES[:2]:
                for output in OUTPUTS:
                    self._program(tokens, min(sequences, tokens), output)

    def _program(self, tokens: int, sequences: int, output: str) -> _Program:
        key = (tokens, sequences, output)
        if key not in self._programs:
            launches, result = _Builder(self, _Inputs(tokens, sequences), output).build()
            self._programs[key] = _Program(launches, self._launcher.capture(launches), result)
        return self._programs[key]

    def _send(self, batch: Batch, output: str) -> _Program:
        if output not in OUTPUTS:
            raise KernelError("run", f"output {output!r}", ", ".join(OUTPUTS))
        check_embedding(batch.ids, batch.types, batch.positions, self._table_sizes)
        lengths = np.diff(batch.cu_seqlens)
        bounds = (int(batch.cu_seqlens[0]), int(batch.cu_seqlens[-1]))
        if not len(lengths) or lengths.min() < 1 or bounds != (0, batch.tokens):
            got = f"cu_seqlens {batch.cu_seqlens.tolist()} for {batch.tokens} tokens"
            raise KernelError("run", got, "bounds that rise from 0 to the number of tokens")
        if batch.tokens > self._capacity:
            self._make_room(batch.tokens)
        tokens = round_to(self._buckets, batch.tokens)
        sequences = min(round_to(SEQUENCES, batch.sequences), tokens)
        inputs = _Inputs(tokens, sequences)
        program = self._program(tokens, sequences, output)
        block = self._room.host[: inputs.places[-1]]
        inputs.write(block, batch)
        self._launcher.to_device(self._room.input, block)
        return program

    def _receive(self, program: _Program, batch: Batch, output: str) -> F32:
        """The rows that belong to the batch, [B, H] or [T, ...]."""
        rows = batch.tokens if output == "tokens" else batch.sequences
        result = program.result
        size = rows * result.ld * 4
        self._launcher.to_host(result.buffer, self._room.answer[:size], result.offset)
        whole = np.asarray(self._room.answer[:size]).view(np.float32).reshape(rows, result.ld)
        return whole[:, : result.columns].copy()

    def _note(self, program: _Program) -> None:
        found: dict[str, str] = {}
        for one in program.launches:
            if one.op == "gemm" and one.site != "classifier":
                found[one.site] = one.ran[0]
            elif one.op == "attention":
                layer = one.site.rpartition(".")[0]
                found[f"{layer}.scores"], found[f"{layer}.context"] = one.ran
        self._executed = found


class _Builder:
    """The launches of one bucket, in order."""

    def __init__(self, session: CudaSession, inputs: _Inputs, output: str) -> None:
        self._s = session
        self._inputs = inputs
        self._output = output
        self._launches: list[Launch] = []

    def build(self) -> tuple[tuple[Launch, ...], Matrix]:
        s, tokens = self._s, self._inputs.tokens
        ids, types, positions, bounds, firsts, work, _ = (
            s._room.input.pointer + 4 * place for place in self._inputs.places
        )
        residual = self._matrix("residual", tokens, s._config.hidden, s._stream)
        to, feed = self._target(s._layers[0].qkv, residual)
        norm = s._embedding_ln
        self._launches.append(ops.embed(tokens, (ids, types, positions), s._tables, norm, to))
        for index, layer in enumerate(s._layers):
            last = index + 1 == len(s._layers)
            first_only = last and self._output == "first"
            rows = self._inputs.sequences if first_only else tokens
            prefix = f"layer.{index}"
            scores, context_kind = layer.precisions
            same = scores == context_kind and scores in HALVES
            kind = scores if same else s._stream
            qkv = self._matrix("qkv", tokens, 3 * s._config.hidden, kind)
            self._gemm(layer.qkv, feed, qkv)
            context = self._matrix("context", rows, s._config.hidden, layer.out.kind)
            self._launches.append(
                ops.attention(
                    qkv,
                    bounds,
                    work,
                    self._inputs.blocks,
                    s._config.heads,
                    context,
                    precisions=layer.precisions,
                    scales=layer.scales,
                    first_only=first_only,
                    bias=s._bias,
                    out_scale=layer.out.scale or 1.0,
                    site=f"{prefix}.attention",
                )
            )
            total = self._matrix("sum", rows, s._config.hidden, s._stream)
            picked = firsts if first_only else 0
            self._gemm(layer.out, context, total, residual=residual, residual_rows=picked)
            residual = self._matrix("residual", rows, s._config.hidden, s._stream)
            to, feed = self._target(layer.ffn_in, residual)
            self._launches.append(ops.layernorm(total, layer.attention_ln, to, site=layer.out.name))
            inner = self._matrix("ffn", rows, s._config.ffn, layer.ffn_out.kind)
            out_scale = layer.ffn_out.scale or 1.0
            self._gemm(layer.ffn_in, feed, inner, act=s._config.act, out_scale=out_scale)
            self._gemm(layer.ffn_out, inner, total, residual=residual)
            if last:
                residual = self._matrix("result", rows, s._config.hidden, "fp32")
                if self._output == "mean":
                    residual = self._matrix("residual", rows, s._config.hidden, s._stream)
                to = Target(residual)
            else:
                to, feed = self._target(s._layers[index + 1].qkv, residual)
            self._launches.append(
                ops.layernorm(total, layer.output_ln, to, site=layer.ffn_out.name)
            )
        result = residual
        if self._output == "mean":
            count = self._inputs.sequences
            result = self._matrix("result", count, s._config.hidden, "fp32")
            self._launches.append(ops.pool(residual, bounds, count, "mean", result))
        elif self._output == "tokens" and s._classifier is not None:
            classes = s._classifier.packed.shape[0]
            result = self._matrix("logits", tokens, classes, "fp32")
            self._gemm(s._classifier, residual, result)
        return tuple(self._launches), result

    def _matrix(self, name: str, rows: int, columns: int, kind: str) -> Matrix:
        return Matrix(self._s._room.buffers[name], 0, (rows, columns), padded(columns), kind)

    def _target(self, site: _Site, residual: Matrix) -> tuple[Target, Matrix]:
        """Both outputs of a layer norm: the residual, and what `site` reads."""
        if site.kind == residual.kind:
            return Target(residual), residual
        feed = self._matrix("feed", residual.rows, residual.columns, site.kind)
        if site.kind in HALVES:
            return Target(residual, halves=feed), feed
        if site.kind == "fp32":
            got = f"{site.name} fp32 behind {residual.kind}"
            raise KernelError("prepare", got, "an fp32 stream")
        if site.scale is not None:
            return Target(residual, integers=feed, scale=site.scale), feed
        buffer = self._s._room.token_scale
        scales = Matrix(buffer, 0, (residual.rows,), padded(residual.rows), "fp32")
        return Target(residual, integers=feed, token_scale=scales), feed

    def _gemm(self, site: _Site, x: Matrix, out: Matrix, **more: Any) -> None:
        row_scale = None
        if site.column_scale is not None and site.scale is None:
            row_scale = Matrix(self._s._room.token_scale, 0, (x.rows,), padded(x.rows), "fp32")
        self._launches.append(
            ops.gemm(
                self._s._room.device,
                x,
                site.packed,
                site.bias,
                out,
                row_scale=row_scale,
                column_scale=site.column_scale,
                site=site.name,
                **more,
            )
        )


def _scalar(tensors: Mapping[str, Array], name: str) -> float:
    if name not in tensors:
        raise KernelError("prepare", f"no {name}", "a calibrated scale for every quantized site")
    return float(tensors[name].reshape(-1)[0])
