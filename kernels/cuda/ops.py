"""Each op as one launch: shapes, addresses and the grid. Pure; nothing is run or allocated here."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from samp_kernels.cuda.formats import BYTES, KINDS, check_precision
from samp_kernels.cuda.launcher import Buffer, Launch, Scalar
from samp_kernels.cuda.tiles import (
    ALL_TILES,
    SLICE,
    TILE_ORDER,
    Choice,
    GroupTile,
    Product,
    choose,
    shared_bytes,
)
from samp_kernels.cuda.units import ATTENTIONS, HEAD_DIMS, WGMMA, attention_unit, gemm_unit, number
from samp_kernels.interface import (
    ACTIVATIONS,
    F32,
    I32,
    Array,
    EmbeddingTables,
    KernelError,
    LayerNorm,
    UnsupportedPrecision,
)

QUERIES = 64
"""Queries of one attention block (attention.cuh)."""

Arguments = tuple[Scalar, ...]
_ACTS: dict[str | None, int] = {None: 0, **{act: i + 1 for i, act in enumerate(ACTIVATIONS)}}
_ORDINARY = {("fp32", "fp32"), ("int8", "fp32"), ("fp32", "int8")}


@dataclass(frozen=True)
class Matrix:
    """Device memory as [rows, columns]; a row takes `ld` elements, a multiple of 16."""

    buffer: Buffer
    offset: int
    shape: tuple[int, ...]
    ld: int
    kind: str

    @property
    def pointer(self) -> int:
        return self.buffer.pointer + self.offset

    @property
    def rows(self) -> int:
        return self.shape[0] if len(self.shape) == 2 else 1

    @property
    def columns(self) -> int:
        return self.shape[-1]

    def __getitem__(self, rows: slice) -> Matrix:
        begin, end, step = rows.indices(self.rows)
        if step != 1 or len(self.shape) != 2:
            raise KernelError(
                "cuda", f"rows {rows} of {list(self.shape)}", "rows one after another"
            )
        offset = self.offset + begin * self.ld * BYTES[self.kind]
        return replace(self, offset=offset, shape=(max(end - begin, 0), self.columns))

    def as_rows(self, rows: int) -> Matrix:
        """The first rows of a buffer that may hold more."""
        return replace(self, shape=(rows, self.columns))


def padded(columns: int) -> int:
    return -(-columns // 16) * 16


def size_of(rows: int, columns: int, kind: str) -> int:
    return rows * padded(columns) * BYTES[kind]


@dataclass(frozen=True)
class Packed:
    """A weight [out, in] on the device, and its scale [out] on the host where it is int8 or fp8."""

    data: Matrix
    precision: str
    scale: F32 | None
    tiled: Buffer | None = None
    """The same in tile order (`in_tiles`), where wgmma may read it."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.rows, self.data.columns


def wants_tiles(architecture: str, precision: str) -> bool:
    """Whether a weight is packed in tile order too, and so wgmma may run: SAMP_WGMMA=0 forbids."""
    allowed = os.environ.get("SAMP_WGMMA", "1") != "0"
    return allowed and architecture == "sm_90a" and precision in WGMMA


def in_tiles(weight: Array) -> Array:
    """A weight [out, in] in the order in which wgmma's tiles read it (gemm_wgmma.cu), as bytes.

    [blocks of 128 rows][slices of 128 bytes][row][byte], zeros behind its end, and the 16-byte
    chunk c of row r at c ^ (r % 8).
    """
    held = np.ascontiguousarray(weight).view(np.uint8)
    rows, columns = held.shape
    blocks, slices = -(-rows // TILE_ORDER), -(-columns // SLICE)
    whole = np.zeros((blocks * TILE_ORDER, slices * SLICE), dtype=np.uint8)
    whole[:rows, :columns] = held
    chunks = whole.reshape(blocks, TILE_ORDER, slices, SLICE // 16, 16).transpose(0, 2, 1, 3, 4)
    row, chunk = np.ogrid[:TILE_ORDER, : SLICE // 16]
    return np.ascontiguousarray(chunks[:, :, row, chunk ^ (row & 7)]).reshape(-1)


@dataclass(frozen=True)
class Workspace:
    """int32 sums and zeroed counters of products that are split over k."""

    sums: Buffer
    counters: Buffer


@dataclass(frozen=True)
class Device:
    """What a launch depends on beside its operands."""

    architecture: str
    multiprocessors: int
    workspace: Workspace | None = None

    @property
    def sm(self) -> int:
        return number(self.architecture)


@dataclass(frozen=True)
class Target:
    """What a row-wise op writes, each or none: floats, a copy in fp16 or bf16, int8 or fp8 with one
    static scale or a scale for each row in `token_scale`."""

    floats: Matrix | None = None
    halves: Matrix | None = None
    integers: Matrix | None = None
    scale: float = 1.0
    token_scale: Matrix | None = None

    def arguments(self) -> tuple[Any, ...]:
        found = [m for m in (self.floats, self.halves, self.integers) if m is not None]
        return (
            _at(self.floats),
            _kind(self.floats),
            _at(self.halves),
            _kind(self.halves),
            _at(self.integers),
            _kind(self.integers),
            _inverse(self.scale),
            _at(self.token_scale),
            np.int32(found[0].ld),
        )


def gemm(
    device: Device,
    x: Matrix,
    packed: Packed,
    bias: Matrix,
    out: Matrix,
    *,
    act: str | None = None,
    residual: Matrix | None = None,
    residual_rows: int = 0,
    row_scale: Matrix | None = None,
    column_scale: Matrix | None = None,
    out_scale: float = 1.0,
    site: str = "",
    choice: Choice | None = None,
) -> Launch:
    """act(x W^T + bias) + residual, to `out`'s kind. `residual_rows`: address of the residual's row
    of each row; 0: the same. `choice` wins over tiles.py."""
    check_precision(packed.precision, device.sm)
    rows, width = x.rows, out.ld
    tail = (
        _at(bias),
        np.int32(_ACTS[act]),
        _at(residual),
        np.uint64(residual_rows),
        np.int32(residual.ld if residual is not None else 0),
        _kind(residual),
        _at(out),
        np.int32(out.ld),
        np.int32(KINDS[out.kind]),
        _inverse(out_scale),
        np.int32(rows),
        np.int32(width),
    )
    if packed.precision == "fp32":
        head: Arguments = (
            _at(x),
            np.int32(x.ld),
            _at(packed.data),
            np.int32(packed.data.ld),
            np.int32(packed.data.rows),
            np.int32(x.columns),
        )
        grid = (-(-width // 64), -(-rows // 64), 1)
        shared = 2 * 16 * 68 * 4
        values: Arguments = (*head, *tail)
        ran = ("fp32",)
        return Launch("gemm_fp32", "gemm_f32", grid, 256, shared, values, "gemm", site, ran)
    each = BYTES[packed.precision]
    product = Product(rows, width, x.columns * each, packed.precision)
    tiled = packed.tiled is not None
    chosen = choice or choose(product, device.sm, device.multiprocessors, tiled=tiled)
    tile, splits = ALL_TILES[chosen.tile], chosen.splits
    grid = (-(-width // tile.n), -(-rows // tile.m), splits)
    unit, ran = gemm_unit(packed.precision, chosen.tile), (packed.precision,)
    shared = shared_bytes(tile, device.sm)
    scales = (_at(row_scale), _at(column_scale))
    if isinstance(tile, GroupTile):
        if packed.tiled is None or splits > 1:
            raise KernelError("gemm", f"{chosen}", "a weight in tile order, not split")
        values = (
            _at(x),
            np.int32(x.ld * each),
            np.uint64(packed.tiled.pointer),
            np.int32(packed.data.rows),
            np.int32(x.columns * each),
            *scales,
            *tail,
        )
        return Launch(unit, "gemm_wgmma", grid, tile.threads, shared, values, "gemm", site, ran)
    sums = counters = 0
    if splits > 1:
        space = device.workspace
        blocks = grid[0] * grid[1] * 4
        if (
            space is None
            or space.sums.size < splits * rows * width * 4
            or space.counters.size < blocks
        ):
            raise KernelError("gemm", f"{splits} splits", "a workspace that holds their sums")
        sums, counters = space.sums.pointer, space.counters.pointer
    values = (
        _at(x),
        np.int32(x.ld * each),
        _at(packed.data),
        np.int32(packed.data.ld * each),
        np.int32(packed.data.rows),
        np.int32(x.columns * each),
        *scales,
        *tail,
        np.int32(splits),
        np.uint64(sums),
        np.uint64(counters),
    )
    return Launch(unit, "gemm", grid, tile.threads, shared, values, "gemm", site, ran)


def attention(
    qkv: Matrix,
    bounds: int,
    tiles: int,
    blocks: int,
    heads: int,
    out: Matrix,
    *,
    precisions: tuple[str, str],
    scales: Mapping[str, float] | None = None,
    first_only: bool = False,
    bias: Matrix | None = None,
    out_scale: float = 1.0,
    site: str = "",
) -> Launch:
    """`bounds`, `tiles`: addresses of int32 cu_seqlens and of `blocks` pairs (sequence, query)."""
    hidden = qkv.columns // 3
    dim = hidden // heads
    check_attention_kind(precisions, dim)
    scores, context = precisions
    needed = ("q", "k") * (scores == "int8") + ("p", "v") * (context == "int8")
    given = {name: (scales or {}).get(name, 0.0) for name in needed}
    if not all(scale > 0.0 for scale in given.values()):
        allowed = f"scales {', '.join(needed)} > 0"
        raise KernelError("attention", f"int8 with scales {scales}", allowed)
    head = (
        _at(qkv),
        np.int32(KINDS[qkv.kind]),
        np.int32(qkv.ld),
        np.int32(hidden),
        np.uint64(bounds),
        np.uint64(tiles),
        np.int32(first_only),
        _at(bias),
        np.int32(bias.ld if bias is not None else 0),
        np.int32(bias.columns // 2 if bias is not None else 0),
    )
    tail = (_at(out), np.int32(out.ld), np.int32(KINDS[out.kind]), _inverse(out_scale))
    q, k, p, v = (given.get(name, 1.0) for name in "qkpv")
    score = np.float32(q * k / math.sqrt(dim))
    grid = (blocks, heads, 1)
    ordinary = precisions in _ORDINARY
    unit = attention_unit(("fp32", "fp32") if ordinary else precisions, dim)
    off = np.float32(0.0)  # To the ordinary cores' kernel: this product is fp32.
    values: Arguments = (
        *head,
        _inverse(q) if scores == "int8" or not ordinary else off,
        _inverse(k) if scores == "int8" or not ordinary else off,
        score,
        _inverse(p) if context == "int8" or not ordinary else off,
        _inverse(v) if context == "int8" or not ordinary else off,
        np.float32(p * v),
        *tail,
    )
    if ordinary:
        shared = 4 * ((QUERIES + 32 + 32) * (dim + 4) + QUERIES * 33)
        kernel, threads = "attention_f32", 256
    else:
        pitch = dim * BYTES[scores] + 16
        v_bytes = dim * (64 + 16) if context == "int8" else 64 * (dim * 2 + 16)
        shared = 2 * 64 * pitch + v_bytes
        kernel, threads = "attention", 128
    return Launch(unit, kernel, grid, threads, shared, values, "attention", site, precisions)


def check_attention_kind(precisions: tuple[str, str], dim: int) -> None:
    """Raises UnsupportedPrecision or KernelError for what no unit computes."""
    if precisions not in _ORDINARY and precisions not in ATTENTIONS:
        allowed = "each int8 or one of fp32, fp16, bf16"
        raise UnsupportedPrecision("cuda attention", " and ".join(precisions), allowed)
    if dim not in HEAD_DIMS:
        allowed = ", ".join(str(d) for d in HEAD_DIMS)
        raise KernelError("attention", f"heads of {dim}", f"heads of {allowed}")


def attention_tiles(cu_seqlens: I32) -> I32:
    """[blocks, 2] int32: the sequence and the first query of each block."""
    lengths = np.diff(cu_seqlens)
    counts = -(-lengths // QUERIES)
    sequences = np.repeat(np.arange(len(lengths), dtype=np.int32), counts)
    starts = np.arange(len(sequences), dtype=np.int32) - np.repeat(
        np.cumsum(counts) - counts, counts
    )
    tiles: I32 = np.stack([sequences, starts * QUERIES], axis=1).astype(np.int32)
    return tiles


def layernorm(
    x: Matrix, ln: LayerNorm, to: Target, *, residual: Matrix | None = None, site: str = ""
) -> Launch:
    """LN(x + residual)."""
    values = (
        _at(x),
        np.int32(KINDS[x.kind]),
        np.int32(x.ld),
        _at(residual),
        _kind(residual),
        np.int32(residual.ld if residual is not None else 0),
        _at(ln.gamma),
        _at(ln.beta),
        np.float32(ln.eps),
        np.int32(x.columns),
        *to.arguments(),
    )
    return _rowwise("layernorm", x.rows, x.columns, values, "add_layernorm", site)


def embed(
    tokens: int,
    indices: tuple[int, int, int],
    tables: EmbeddingTables,
    ln: LayerNorm,
    to: Target,
) -> Launch:
    """`indices`: addresses of ids, types and positions, int32 [tokens]."""
    values = (
        *(np.uint64(pointer) for pointer in indices),
        _at(tables.word),
        _at(tables.position),
        _at(tables.type),
        np.int32(tables.word.ld),
        _at(ln.gamma),
        _at(ln.beta),
        np.float32(ln.eps),
        np.int32(tables.word.columns),
        *to.arguments(),
    )
    width = tables.word.columns
    return _rowwise("embed", tokens, width, values, "embed_layernorm", "embeddings")


def convert(x: Matrix, to: Target) -> Launch:
    values = (_at(x), np.int32(KINDS[x.kind]), np.int32(x.ld), np.int32(x.columns), *to.arguments())
    return _rowwise("convert", x.rows, x.columns, values, "quantize", "")


def pool(x: Matrix, bounds: int, sequences: int, how: str, out: Matrix) -> Launch:
    values = (
        _at(x),
        np.int32(KINDS[x.kind]),
        np.int32(x.ld),
        np.uint64(bounds),
        np.int32(how == "mean"),
        np.int32(x.columns),
        _at(out),
        np.int32(out.ld),
    )
    return Launch("rows", "pool", (sequences, 1, 1), 128, 0, values, "pool", "pool")


def _rowwise(
    kernel: str, rows: int, width: int, values: tuple[Any, ...], op: str, site: str
) -> Launch:
    if width > 11_000:  # A row stands in 48 KiB of shared memory.
        raise KernelError(op, f"rows of {width}", "at most 11000 columns")
    shared = (32 + padded(width)) * 4
    return Launch("rows", kernel, (rows, 1, 1), 128, shared, values, op, site)


def _at(x: Matrix | None) -> np.uint64:
    return np.uint64(0 if x is None else x.pointer)


def _kind(x: Matrix | None) -> np.int32:
    return np.int32(0 if x is None else KINDS[x.kind])


def _inverse(scale: float) -> np.float32:
    return np.float32(1.0 / scale)
