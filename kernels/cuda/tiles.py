"""Which tile of the tensor-core GEMM runs a product, and over how many blocks k is split.

A pure function of the product and the device. Its figures are rough rates of the hardware, read
nowhere but here; `MEASURED` wins where a measurement was made. A tile is one of mma.sync (gemm.cu)
or, on sm_90a with a weight in tile order, one of wgmma (gemm_wgmma.cu).
"""

from __future__ import annotations

from dataclasses import dataclass

SLICE = 128  # bytes of k that one step of the pipeline holds
_SHARED = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227}  # KiB that one block may have


@dataclass(frozen=True)
class Tile:
    """m x n of the result, by warps_m x warps_n warps."""

    m: int
    n: int
    warps_m: int
    warps_n: int

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n

    def stage_bytes(self) -> int:
        return (self.m + self.n) * SLICE


TILES = {
    "128x128": Tile(128, 128, 2, 4),
    "128x64": Tile(128, 64, 4, 2),
    "64x64": Tile(64, 64, 2, 2),
    "32x64": Tile(32, 64, 2, 2),
    "16x64": Tile(16, 64, 1, 4),
}


@dataclass(frozen=True)
class GroupTile:
    """m x n of the result, by m / 64 warpgroups and four warps that copy for them."""

    m: int
    n: int

    @property
    def threads(self) -> int:
        return 128 * (self.m // 64 + 1)

    def stage_bytes(self) -> int:
        return (self.m + self.n) * SLICE


GROUP_TILES = {
    "wgmma_64x64": GroupTile(64, 64),
    "wgmma_64x128": GroupTile(64, 128),
    "wgmma_128x128": GroupTile(128, 128),
    "wgmma_128x256": GroupTile(128, 256),
}
ALL_TILES: dict[str, Tile | GroupTile] = {**TILES, **GROUP_TILES}
TILE_ORDER = 128
"""Rows of one block of a weight in tile order."""


def tiles_of(precision: str, tiled: bool) -> tuple[str, ...]:
    """What may run a product; `tiled`: with a weight in tile order.

    Floats must not depend on how many rows there are, and wgmma's float sums may differ from those
    of mma.sync: where the weight is in tile order, all are wgmma's. int8's are the same anyhow.
    """
    if tiled and precision != "int8":
        return tuple(GROUP_TILES)
    return (*TILES, *GROUP_TILES) if tiled else tuple(TILES)


def stages(tile: Tile | GroupTile, sm: int) -> int:
    """Slices in flight: two before sm_80, which copies at once; else two blocks shall fit. wgmma:
    one block, of 192 KiB."""
    if isinstance(tile, GroupTile):
        return 192 * 1024 // tile.stage_bytes()
    if sm < 80:
        return 2
    for count in (4, 3):
        if 2 * count * tile.stage_bytes() <= _SHARED[sm] * 1024:
            return count
    return 3


def shared_bytes(tile: Tile | GroupTile, sm: int) -> int:
    """The pipeline's, and afterwards the block's sums in the same place; wgmma: two barriers of 8
    bytes a stage behind it."""
    if isinstance(tile, GroupTile):
        return stages(tile, sm) * (tile.stage_bytes() + 16)
    return max(stages(tile, sm) * tile.stage_bytes(), tile.m * tile.n * 4)


@dataclass(frozen=True)
class Product:
    """y [rows, width] = x [rows, k_bytes] W^T; int8, fp8, fp16 or bf16."""

    rows: int
    width: int
    k_bytes: int
    precision: str


@dataclass(frozen=True)
class Choice:
    tile: str
    splits: int = 1


MEASURED: dict[tuple[int, Product], Choice] = {}
"""(sm, product) -> what a measurement found fastest. Empty: nothing has run on a GPU yet."""


def choose(
    product: Product,
    sm: int,
    multiprocessors: int,
    measured: dict[tuple[int, Product], Choice] | None = None,
    *,
    tiled: bool = False,
) -> Choice:
    """The tile and the split with the least estimated time, the larger tile where two are equal.

    Only int8 is split: its sums are exact, so the split never shows in a result; a float's would.
    wgmma's tiles are not split, and int8 leaves them where they would not be full.
    """
    allowed = tiles_of(product.precision, tiled)
    known = (MEASURED if measured is None else measured).get((sm, product))
    if known is not None and known.tile in allowed:
        return known
    best, least = Choice(allowed[0]), float("inf")
    for name in allowed:
        tile = ALL_TILES[name]
        grouped = isinstance(tile, GroupTile)
        if grouped and product.precision == "int8" and not _fills(product, tile):
            continue
        for splits in (1, 2, 4, 8) if product.precision == "int8" and not grouped else (1,):
            cost = estimate(product, name, splits, multiprocessors)
            if cost < least:
                best, least = Choice(name, splits), cost
    return best


def _fills(product: Product, tile: Tile | GroupTile) -> bool:
    return product.rows >= tile.m and product.width >= tile.n


def estimate(product: Product, name: str, splits: int, multiprocessors: int) -> float:
    """Cycles, roughly: waves of blocks, each of slices that are bound by products or by copies."""
    tile = ALL_TILES[name]
    blocks = -(-product.rows // tile.m) * -(-product.width // tile.n) * splits
    slices = -(-product.k_bytes // SLICE)
    if splits > slices:
        return float("inf")
    rate = 4096 if isinstance(tile, GroupTile) else 2048  # int8 MACs a cycle
    multiply = tile.m * tile.n * SLICE / rate
    copy = tile.stage_bytes() / 48
    waves = -(-blocks // multiprocessors)
    fixed = 600 + (tile.m * tile.n) / 16  # to fill the pipeline, to write the result
    merge = 0 if splits == 1 else 400 + tile.m * tile.n * splits / 8
    return waves * (-(-slices // splits) * max(multiply, copy) + fixed + merge)


def room_for(rows: int, width: int) -> tuple[int, int]:
    """(int32 sums, counters) that a split product of this size may need at most."""
    smallest = min(tile.m for tile in TILES.values())
    narrowest = min(tile.n for tile in TILES.values())
    return 8 * rows * width, -(-rows // smallest) * -(-width // narrowest)
