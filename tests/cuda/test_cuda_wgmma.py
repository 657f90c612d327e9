"""wgmma's GEMM, emulated: descriptors, swizzle, barriers and copies by PTX's rules, and the same
results as mma.sync's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated import backend, launcher, needs_compiler, normal
from samp_kernels.cuda import ops
from samp_kernels.cuda.backend import CudaBackend
from samp_kernels.cuda.formats import BYTES, DTYPES, encode
from samp_kernels.cuda.ops import Packed
from samp_kernels.cuda.tiles import GROUP_TILES, Choice
from samp_kernels.cuda.units import SOURCES, WGMMA
from samp_kernels.interface import Array, KernelError

# Whole numbers whose products sum up exactly: an e4m3 has four bits, bf16 eight, and 2^24 bounds
# the sums.
LARGEST = {"int8": 127, "fp16": 100, "bf16": 100, "fp8": 15}


def whole(rng: np.random.Generator, kind: str, *shape: int) -> Array:
    return rng.integers(-LARGEST[kind], LARGEST[kind] + 1, shape)


def pack(b: CudaBackend, weight: Array, kind: str) -> Packed:
    data = ops.in_tiles(encode(weight, kind))
    tiled = b.launcher.allocate(data.nbytes)
    b.launcher.to_device(tiled, data)
    return Packed(b.array(weight, kind), kind, None, tiled)


def run(b: CudaBackend, x: Any, packed: Packed, bias: Any, out: str, tile: str, **more: Any) -> Any:
    y = b.empty(x.rows, packed.shape[0], out)
    one = ops.gemm(b.device(), x, packed, bias, y, choice=Choice(tile), **more)
    b.launcher.launch(one)
    assert (one.kernel == "gemm_wgmma") == (tile in GROUP_TILES)
    return b.to_host(y), one.unit


@pytest.mark.parametrize("kind", ["int8", "fp16"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (128, 128), (130, 300)])
def test_tile_order(rows: int, columns: int, kind: str) -> None:
    """Each byte where the kernel looks for it, zeros elsewhere."""
    numbers = np.random.default_rng(0).integers(1, 256, (rows, columns * BYTES[kind]))
    weight = numbers.astype(np.uint8)
    tiled = ops.in_tiles(weight.view(DTYPES[kind]))
    columns *= BYTES[kind]
    slices = -(-columns // 128)
    row, column = np.ogrid[:rows, :columns]
    block = (row // 128) * slices + column // 128
    chunk = (column % 128 // 16) ^ (row % 8)
    at = block * 128 * 128 + row % 128 * 128 + chunk * 16 + column % 16
    assert np.array_equal(tiled[at], weight)
    assert np.count_nonzero(tiled) == rows * columns


@needs_compiler
@pytest.mark.parametrize("tile", GROUP_TILES)
@pytest.mark.parametrize("kind", WGMMA)
def test_products_are_exact(kind: str, tile: str) -> None:
    """At every edge, in every order of threads and of bulk copies."""
    rng = np.random.default_rng(7)
    shapes = [(1, 5, 16), (64, 128, 128), (141, 1300, 136), (70, 900, 300)]
    for order, (rows, k, n) in enumerate(shapes):
        b = backend("sm_90a", order=(0, 0, 1, 6)[order])
        x, w = whole(rng, kind, rows, k), whole(rng, kind, n, k)
        bias, columns = b.array(np.arange(n)), b.array(np.full(n, 0.5))
        packed, held = pack(b, w, kind), b.array(x, kind)
        y, unit = run(b, held, packed, bias, "fp32", tile, column_scale=columns)
        assert np.array_equal(y, (x @ w.T) * 0.5 + np.arange(n))
        alone, _ = run(b, held[:1], packed, bias, "fp32", tile, column_scale=columns)
        assert np.array_equal(alone, y[:1])
        counts = launcher(b).counts(unit)
        assert counts.mma > 0
        assert counts.copies > 0
        launcher(b).check_guards()


@needs_compiler
@pytest.mark.parametrize("out", ["fp32", "bf16", "int8", "fp8"])
@pytest.mark.parametrize("kind", WGMMA)
def test_the_epilogue_is_that_of_mma_sync(kind: str, out: str) -> None:
    """Bit for bit: the sums are exact, so all that follows is the same."""
    rng = np.random.default_rng(8)
    b = backend("sm_90a")
    rows, k, n = 83, 200, 130
    packed, x = pack(b, whole(rng, kind, n, k), kind), b.array(whole(rng, kind, rows, k), kind)
    bias = b.array(normal(rng, n))
    more: Any = {
        "act": "gelu",
        "residual": b.array(normal(rng, rows, n), "fp16"),
        "row_scale": b.array(rng.uniform(0.5, 2.0, rows)),
        "column_scale": b.array(rng.uniform(0.5, 2.0, n) / 1000),
        "out_scale": 0.01,
    }
    wanted, _ = run(b, x, packed, bias, out, "64x64", **more)
    assert len(np.unique(wanted)) > 20
    for tile in GROUP_TILES:
        assert np.array_equal(run(b, x, packed, bias, out, tile, **more)[0], wanted)


MISTAKES = {
    "no fence": ("gemm_wgmma.cu", "        fence_async();\n        arrive(", "        arrive("),
    "a place let go too early": ("gemm_wgmma.cu", "wait_products<1>();", ""),
    "a place taken too early": (
        "gemm_wgmma.cu",
        "wait_barrier(empty + at",
        "if (0) wait_barrier(empty + at",
    ),
    "rows in other chunks": ("slices.cuh", "(row & 7)", "(row & 3)"),
    "another stride": ("hopper.cuh", "64ull << 32", "32ull << 32"),
    "bytes that never come": ("gemm_wgmma.cu", "parts * PART_BYTES)", "NS * PART_BYTES + 16)"),
}


@needs_compiler
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_emulator_sees_a_mistake(mistake: str, tmp_path: Path) -> None:
    """A wrong kernel gives another result or is stopped; it runs in a process of its own."""
    file, right, wrong = MISTAKES[mistake]
    sources = tmp_path / "src"
    shutil.copytree(SOURCES, sources)
    text = (sources / file).read_text()
    assert right in text
    (sources / file).write_text(text.replace(right, wrong, 1))
    script = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from samp_kernels.cuda import emulator
emulator.SOURCES = Path({str(sources)!r})
import test_cuda_wgmma
test_cuda_wgmma.test_products_are_exact("int8", "wgmma_64x128")
"""
    environment = {"SAMP_EMULATED": str(tmp_path / "made"), "SAMP_EMULATED_FLAGS": "-O1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "AssertionError" in done.stderr or "cuda_on_cpu: " in done.stderr, done.stderr


def test_wgmma_needs_a_weight_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    b = backend("sm_90a")
    x, bias = b.empty(16, 16, "int8"), b.empty(1, 16, "fp32")
    with pytest.raises(KernelError, match="a weight in tile order"):
        ops.gemm(b.device(), x, Packed(x, "int8", None), bias, bias, choice=Choice("wgmma_64x128"))
    assert ops.wants_tiles("sm_90a", "fp8")
    assert not ops.wants_tiles("sm_89", "fp8")
    assert ops.wants_tiles("sm_90a", "fp16")
    assert not ops.wants_tiles("sm_90a", "fp32")
    monkeypatch.setenv("SAMP_WGMMA", "0")
    assert not ops.wants_tiles("sm_90a", "fp8")
