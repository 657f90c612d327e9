"""The extension that setup.py builds from src/. Arrays are written where they lie, never copied."""

from samp_kernels.interface import F32, I32, Array

class Packed:
    def __init__(self, weight: Array, level: Level | None = None) -> None: ...
    n: int
    k: int
    int8: bool
    bytes: int

class Level:
    name: str
    panel: int

    def gemm(
        self,
        x: Array,
        packed: Packed,
        col_scale: F32 | None = None,
        row_scale: F32 | None = None,
        *,
        bias: F32,
        act: int = 0,
        residual: F32 | None = None,
        out_f: F32 | None = None,
        out_q: Array | None = None,
        inv_scale: float = 1.0,
        side_x: F32 | None = None,
        side_w: F32 | None = None,
    ) -> None: ...
    def sums(self, x: Array, packed: Packed, out: I32) -> None: ...
    def add_layernorm(
        self,
        x: F32,
        residual: F32 | None,
        gamma: F32,
        beta: F32,
        eps: float,
        out_f: F32 | None = None,
        out_q: Array | None = None,
        inv_scale: float = 1.0,
        token_scale: F32 | None = None,
    ) -> None: ...
    def embed(
        self,
        ids: I32,
        types: I32,
        positions: I32,
        word: F32,
        position: F32,
        type: F32,
        gamma: F32,
        beta: F32,
        eps: float,
        out_f: F32 | None = None,
        out_q: Array | None = None,
        inv_scale: float = 1.0,
        token_scale: F32 | None = None,
    ) -> None: ...
    def quantize(
        self, x: F32, out_q: Array, inv_scale: float = 1.0, token_scale: F32 | None = None
    ) -> None: ...
    def attention(
        self,
        qkv: Array,
        cu_seqlens: I32,
        heads: int,
        position_bias: F32 | None = None,
        int8_scores: bool = False,
        int8_context: bool = False,
        q_scale: float = 1.0,
        k_scale: float = 1.0,
        p_scale: float = 1.0,
        v_scale: float = 1.0,
        first_only: bool = False,
        out_f: F32 | None = None,
        out_q: Array | None = None,
        inv_scale: float = 1.0,
    ) -> None: ...
    def mean(self, x: F32, cu_seqlens: I32, out: F32) -> None: ...

class Session:
    """A whole encoder under one plan (encoder.h)."""

    def __init__(
        self,
        level: Level,
        layers: int,
        hidden: int,
        heads: int,
        ffn: int,
        act: int,
        eps: float,
        threads: int,
    ) -> None: ...
    def set_embeddings(
        self, word: F32, position: F32, type: F32, gamma: F32, beta: F32
    ) -> None: ...
    def set_gemm(
        self,
        layer: int,
        which: str,
        packed: Packed,
        bias: F32,
        weight_scale: F32,
        input_scale: float,
        outliers: I32,
        outlier_weight: F32,
    ) -> None: ...
    def set_norm(self, layer: int, which: str, gamma: F32, beta: F32) -> None: ...
    def set_attention(self, layer: int, q: float, k: float, p: float, v: float) -> None: ...
    def set_position_bias(self, table: F32) -> None: ...
    def run(
        self, ids: I32, types: I32, positions: I32, cu: I32, output: int, timed: bool
    ) -> F32: ...
    def seconds(self) -> list[float]: ...
    def busy(self) -> tuple[float, list[list[float]]]: ...
    def executed(self) -> list[int]: ...
    def close(self) -> None: ...

def find_level(name: str = "") -> Level: ...
def current_level() -> Level: ...
def levels() -> dict[str, str]: ...
