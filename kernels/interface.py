"""The kernel interface: what every backend computes, on which shapes, and how it fails.

Activations are flat `[tokens, features]`, row-major; `cu_seqlens` is int32 `[sequences + 1]`.
Quantization is symmetric: value = scale * q, round half to even; q is a whole number in [-127, 127]
(int8) or an E4M3 number up to 448 (fp8, see e4m3.py). Weights are stored portable (int8 or e4m3
codes `[out, in]`, fp32 scale `[out]`); a backend packs them in `pack`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

SITES = ("qkv", "scores", "context", "out", "ffn_in", "ffn_out")
"""The GEMMs of one layer that a plan can set, in the order in which they run."""

GEMM_SITES = ("qkv", "out", "ffn_in", "ffn_out")
"""The sites that hold weights; `scores` and `context` multiply activations."""

LARGEST = {"int8": 127.0, "fp8": 448.0}
"""Of a quantized value, by precision: a scale is the largest magnitude over this."""

CODES: Mapping[str, type[np.generic]] = {"int8": np.int8, "fp8": np.uint8}
"""What a quantized precision is stored in: fp8 in the codes of e4m3."""

Activation = Literal["gelu", "gelu_tanh", "tanh", "relu"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)
OutputKind = Literal["first", "mean", "tokens"]


class KernelError(Exception):
    """An op was called outside its contract. Names the op, what came and what is allowed."""

    def __init__(self, op: str, got: str, allowed: str) -> None:
        super().__init__(f"{op}: got {got}; allowed: {allowed}")
        self.op = op
        self.got = got
        self.allowed = allowed


class UnsupportedPrecision(KernelError):
    """A plan names a precision that this backend does not have for this op."""


@dataclass(frozen=True)
class QTensor:
    """A quantized activation: value = scale * q. `scale` is a float or one value a token.

    `data` holds int8, codes of e4m3 or a storage of the backend's own (u8 with zero point 128 on
    `onednn` and `cpu`). `kept` [T, k] holds the float values of the channels that `Out.keep` named.
    """

    data: Any
    scale: float | Any
    shape: tuple[int, int]
    kept: Any = None


@dataclass(frozen=True)
class Out:
    """What an op writes: a precision and, for int8 and fp8, a static scale or "token".

    `keep`: channels whose float values go beside the quantized ones, for the outlier split.
    """

    dtype: str = "fp32"
    scale: float | Literal["token"] | None = None
    keep: tuple[int, ...] = ()


@dataclass(frozen=True)
class Weight:
    """One stored matrix `[out, in]`: fp32, or with a scale `[out]` int8 or uint8, codes of e4m3.

    The outlier split of an int8 one: `data` holds zeros at the input channels `outliers` [k], and
    the gemm adds x[:, outliers] @ outlier_weight^T in fp32, `outlier_weight` being [out, k].
    """

    data: Array
    scale: F32 | None = None
    outliers: I32 | None = None
    outlier_weight: F32 | None = None


@dataclass(frozen=True)
class LayerNorm:
    """gamma, beta `[hidden]` and epsilon."""

    gamma: Any
    beta: Any
    eps: float


@dataclass(frozen=True)
class EmbeddingTables:
    """word `[vocab, H]`, position `[P, H]`, type `[types, H]`."""

    word: Any
    position: Any
    type: Any


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of one encoder; every family maps onto it (samp_core/checkpoint.py)."""

    family: str
    layers: int
    hidden: int
    heads: int
    ffn: int
    vocab: int
    positions: int
    types: int
    eps: float
    act: Activation = "gelu"
    position_offset: int = 0
    position_bias: bool = False
    """Whether attention adds the tensor `position_bias`, [heads, 2 positions - 1]."""

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


@dataclass(frozen=True)
class Batch:
    """Packed sequences: ids, types, positions `[T]` int32, cu_seqlens `[B + 1]` int32."""

    ids: I32
    types: I32
    positions: I32
    cu_seqlens: I32
    max_seqlen: int

    @property
    def sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def tokens(self) -> int:
        return len(self.ids)


class Backend(Protocol):
    """One implementation of the ops. Arrays are the backend's own unless an op says otherwise."""

    name: str
    ran: tuple[str, ...]
    """The precision of the kernel that the last gemm called (attention: scores, context)."""

    # A backend may have `token_bucket(tokens) -> rows`: how many rows it rounds a flat run up to.
    # Rows beyond cu_seqlens[-1] belong to no sequence; attention writes zeros there.

    def capabilities(self) -> frozenset[tuple[str, str, str]]:
        """(op, precision, activation scale "static" | "token" | "") triples that really run.

        ("gemm", "residual", "") says that `gemm` adds a residual in its epilogue,
        ("gemm", "outliers", "") that it has the outlier split of `Weight`.
        """
        ...

    def array(self, x: Array) -> Any:
        """A host array as this backend holds it."""
        ...

    def pack(self, weight: Weight, precision: str) -> Any:
        """A stored matrix as the gemm of that precision wants it."""
        ...

    def embed_layernorm(
        self,
        ids: I32,
        types: I32,
        positions: I32,
        tables: EmbeddingTables,
        ln: LayerNorm,
        out: Out,
    ) -> tuple[Any, Any]:
        """LN(word[ids] + position[positions] + type[types]) -> (residual [T, H], x)."""
        ...

    def gemm(
        self,
        x: Any,
        packed: Any,
        bias: Any,
        *,
        act: Activation | None = None,
        residual: Any = None,
        out: Out,
    ) -> Any:
        """act(x @ W^T + bias) + residual, then to `out`. x: [T, in], or a QTensor of it."""
        ...

    def attention(
        self,
        qkv: Any,
        cu_seqlens: I32,
        max_seqlen: int,
        heads: int,
        *,
        position_bias: Any = None,
        precisions: tuple[str, str] = ("fp32", "fp32"),
        scales: Mapping[str, float] | None = None,
        out: Out,
    ) -> Any:
        """softmax(Q K^T / sqrt(d) + bias) V inside each sequence; qkv [T, 3H] -> [T, H].

        `precisions` are those of `scores` and `context`; int8 reads the scales `q`, `k`, `p`, `v`.
        `position_bias` [heads, 2 n - 1] depends on the distance alone: query i adds
        position_bias[head, n - 1 + j - i] to the score of key j, in float whatever the precision.
        No sequence is longer than n. One row of it serves a query as it lies.
        """
        ...

    def add_layernorm(
        self, x: Any, ln: LayerNorm, *, residual: Any = None, out: Out
    ) -> tuple[Any, Any]:
        """LN(x + residual) -> (float [T, H], the same as `out`)."""
        ...

    def quantize(self, x: Any, out: Out) -> Any:
        """A float activation to `out`; for backends that cannot fuse it."""
        ...

    def pool(self, x: Any, cu_seqlens: I32, how: Literal["first", "mean"]) -> Any:
        """[T, H] -> [B, H]."""
        ...

    def to_host(self, x: Any) -> Array:
        """A result as a NumPy array."""
        ...


@runtime_checkable
class Session(Protocol):
    """One encoder under one plan, ready to run. Not thread-safe; one a process."""

    def run(
        self, batch: Batch, *, output: OutputKind = "first", bit_layers: int | None = None
    ) -> F32:
        """[B, H] for first and mean; [T, H] (or [T, C] with a token classifier) for tokens."""
        ...

    def profile(self, batch: Batch) -> list[tuple[str, str, float]]:
        """(op, site, seconds) of one pass, in the order in which the ops ran."""
        ...

    def executed(self) -> dict[str, str]:
        """site -> precision, filled by the op that really ran in the last pass."""
        ...

    def close(self) -> None: ...


def check_gemm(x: Any, weight: tuple[int, ...], bias: Any, act: str | None, residual: Any) -> None:
    """The operands of one gemm against its weight `[out, in]`. Raises KernelError."""
    outputs, inputs = weight
    if len(x.shape) != 2 or x.shape[1] != inputs:
        raise KernelError("gemm", f"x {list(x.shape)}", f"x [tokens, {inputs}]")
    if tuple(bias.shape) != (outputs,):
        raise KernelError("gemm", f"bias {list(bias.shape)}", f"bias [{outputs}]")
    if residual is not None and tuple(residual.shape) != (x.shape[0], outputs):
        allowed = f"residual [{x.shape[0]}, {outputs}]"
        raise KernelError("gemm", f"residual {list(residual.shape)}", allowed)
    if act is not None and act not in ACTIVATIONS:
        raise KernelError("gemm", f"activation {act!r}", ", ".join(ACTIVATIONS))


def check_weight(weight: Weight, precision: str, able: Sequence[str] = ("fp32", "int8")) -> None:
    """A stored matrix of a precision of `able`, and its outlier split. Raises KernelError."""
    scaled = weight.scale is not None
    stored = CODES["fp8"] if weight.data.dtype == CODES["fp8"] else CODES["int8"]
    fits = stored == CODES[precision] if precision in CODES else True
    if precision not in able or scaled != (precision in CODES) or not fits:
        got = f"{precision} from {weight.data.dtype}{' + scale' * scaled}"
        words = {"fp32": "fp32 from fp32", "int8": "int8 from int8 + scale"}
        words["fp8"] = "fp8 from uint8 (e4m3) + scale"
        raise UnsupportedPrecision("pack", got, ", ".join(words[a] for a in able))
    if weight.outliers is None and weight.outlier_weight is None:
        return
    wanted = (weight.data.shape[0], 0 if weight.outliers is None else len(weight.outliers))
    found = None if weight.outlier_weight is None else weight.outlier_weight.shape
    if weight.scale is None or weight.outliers is None or found != wanted or precision != "int8":
        got = f"outlier_weight {found}"
        raise KernelError("pack", got, f"{list(wanted)} beside int8, a column for each outlier")
    if wanted[1] and not 0 <= weight.outliers.min() <= weight.outliers.max() < weight.data.shape[1]:
        raise KernelError("pack", f"outliers {weight.outliers.tolist()}", "input channels")


def check_kept(x: QTensor, outliers: int) -> None:
    """A quantized activation beside the float values that a weight's outlier split reads."""
    shape = None if x.kept is None else tuple(x.kept.shape)
    if (outliers or shape is not None) and shape != (x.shape[0], outliers):
        raise KernelError("gemm", f"kept {shape}", f"kept [{x.shape[0]}, {outliers}]")


def check_attention(qkv: Any, cu_seqlens: I32, heads: int, position_bias: Any = None) -> None:
    """Packed rows against their bounds, heads and biases. Raises KernelError."""
    tokens, width = qkv.shape
    if heads < 1 or width % (3 * heads):
        raise KernelError("attention", f"qkv [{tokens}, {width}], {heads} heads", "[T, 3 heads d]")
    bounds = cu_seqlens.tolist()
    rises = all(begin < end for begin, end in itertools.pairwise(bounds))
    if bounds[0] != 0 or bounds[-1] > tokens or not rises:
        raise KernelError("attention", f"cu_seqlens {bounds}", f"rising from 0, at most {tokens}")
    if position_bias is not None:
        shape = tuple(position_bias.shape)
        longest = max(end - begin for begin, end in itertools.pairwise(bounds))
        if len(shape) != 2 or shape[0] != heads or shape[1] % 2 != 1 or shape[1] < 2 * longest - 1:
            allowed = f"[{heads}, 2 n - 1], n at least {longest}, the longest sequence"
            raise KernelError("attention", f"position_bias {list(shape)}", allowed)


def position_bias_of(config: EncoderConfig, tensors: Mapping[str, Array]) -> Array | None:
    """The tensor `position_bias` of an encoder that has one. Raises KernelError."""
    if not config.position_bias:
        return None
    wanted = (config.heads, 2 * config.positions - 1)
    bias = tensors.get("position_bias")
    if bias is None or bias.shape != wanted:
        got = "no position_bias" if bias is None else f"position_bias {list(bias.shape)}"
        raise KernelError("prepare", got, f"position_bias {list(wanted)}")
    return bias


def check_embedding(ids: I32, types: I32, positions: I32, tables: EmbeddingTables) -> None:
    """Every index against its table. Raises KernelError."""
    for name, index, table in (
        ("ids", ids, tables.word),
        ("positions", positions, tables.position),
        ("types", types, tables.type),
    ):
        low, high = int(index.min(initial=0)), int(index.max(initial=0))
        if low < 0 or high >= table.shape[0]:
            got = f"{name} from {low} to {high}"
            raise KernelError("embed_layernorm", got, f"0 to {table.shape[0] - 1}")


def pack_batch(ids: Sequence[Array], types: Sequence[Array], *, position_offset: int = 0) -> Batch:
    """Rows of different lengths -> one flat batch without padding."""
    lengths = np.fromiter((len(row) for row in ids), dtype=np.int32, count=len(ids))
    if len(lengths) == 0 or int(lengths.min()) < 1:
        raise KernelError("pack_batch", f"lengths {lengths.tolist()}", "one row or more, each >= 1")
    cu_seqlens = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    positions = np.arange(cu_seqlens[-1], dtype=np.int32) - np.repeat(cu_seqlens[:-1], lengths)
    return Batch(
        ids=np.concatenate(ids).astype(np.int32, copy=False),
        types=np.concatenate(types).astype(np.int32, copy=False),
        positions=positions + np.int32(position_offset),
        cu_seqlens=cu_seqlens,
        max_seqlen=int(lengths.max()),
    )
