"""Which tile and split run a product: pure, so tested without a device."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from samp_kernels.cuda.tiles import (
    ALL_TILES,
    GROUP_TILES,
    SLICE,
    TILES,
    Choice,
    Product,
    choose,
    room_for,
    shared_bytes,
    stages,
)
from samp_kernels.cuda.units import ARCHITECTURES, all_units, for_device, number

SMS = tuple(number(architecture) for architecture in ARCHITECTURES)
products = st.builds(
    Product,
    st.integers(1, 20000),
    st.integers(1, 4096).map(lambda n: -(-n // 16) * 16),
    st.integers(1, 8192),
    st.sampled_from(["int8", "fp8", "fp16", "bf16"]),
)


@given(products, st.sampled_from(SMS), st.integers(1, 200), st.booleans())
def test_any_product_has_a_tile(
    product: Product, sm: int, multiprocessors: int, tiled: bool
) -> None:
    choice = choose(product, sm, multiprocessors, tiled=tiled)
    assert choice.tile in (ALL_TILES if tiled else TILES)
    assert choice == choose(product, sm, multiprocessors, tiled=tiled)
    if choice.tile in GROUP_TILES or product.precision != "int8":
        assert choice.splits == 1, "the order of a float sum would depend on the batch"
    tile = ALL_TILES[choice.tile]
    assert choice.splits <= max(1, -(-product.k_bytes // SLICE))
    sums, counters = room_for(product.rows, product.width)
    assert choice.splits * product.rows * product.width <= sums
    assert -(-product.rows // tile.m) * -(-product.width // tile.n) <= counters


@pytest.mark.parametrize(
    ("product", "wanted"),
    [
        (Product(4096, 3072, 768, "int8"), "128x128"),
        (Product(16, 768, 768, "int8"), "16x64"),
        (Product(1, 768, 768, "fp16"), "16x64"),
    ],
)
def test_the_tile_follows_the_size(product: Product, wanted: str) -> None:
    assert choose(product, 90, 132).tile == wanted


def test_a_small_product_is_split_until_the_device_is_full() -> None:
    few = choose(Product(16, 768, 3072, "int8"), 90, 132)
    assert few.splits > 1
    assert choose(Product(16384, 3072, 3072, "int8"), 90, 132).splits == 1


def test_a_measured_choice_wins() -> None:
    product = Product(16, 768, 3072, "int8")
    known = {(90, product): Choice("64x64", 2)}
    assert choose(product, 90, 132, known) == Choice("64x64", 2)
    assert choose(product, 80, 132, known) == choose(product, 80, 132)


@given(st.integers(1, 20000), st.integers(1, 4096), st.integers(1, 8192))
def test_fp8_in_tile_order_is_wgmmas_whatever_the_batch(rows: int, width: int, k: int) -> None:
    assert choose(Product(rows, width, k, "fp8"), 90, 132, tiled=True).tile in GROUP_TILES
    assert choose(Product(rows, width, k, "fp8"), 89, 58).tile in TILES


def test_int8_takes_wgmma_where_its_tiles_are_full() -> None:
    assert choose(Product(4096, 3072, 768, "int8"), 90, 132, tiled=True).tile == "wgmma_128x256"
    for rows, width in ((63, 768), (4096, 112)):
        assert choose(Product(rows, width, 768, "int8"), 90, 132, tiled=True).tile in TILES
    known = {(90, Product(64, 768, 768, "int8")): Choice("wgmma_64x128")}
    (product,) = (key[1] for key in known)
    assert choose(product, 90, 132, known, tiled=True) == Choice("wgmma_64x128")
    assert choose(product, 90, 132, known).tile in TILES, "not without a weight in tile order"


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("name", TILES)
def test_a_tile_fits_into_shared_memory(name: str, sm: int) -> None:
    limit = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227}[sm] * 1024
    assert shared_bytes(TILES[name], sm) <= limit
    assert stages(TILES[name], sm) >= 2


@pytest.mark.parametrize("name", GROUP_TILES)
def test_a_tile_of_wgmma_fits_into_shared_memory(name: str) -> None:
    tile = GROUP_TILES[name]
    assert shared_bytes(tile, 90) <= 227 * 1024
    assert tile.m * tile.n * 4 <= stages(tile, 90) * tile.stage_bytes()
    assert stages(tile, 90) >= 4


def test_a_device_gets_the_cubins_that_it_runs() -> None:
    pairs = {75: "sm_75", 80: "sm_80", 86: "sm_86", 87: "sm_86", 89: "sm_89", 90: "sm_90a"}
    for capability, architecture in pairs.items():
        assert for_device(capability) == architecture
    for capability in (61, 70, 100, 120):
        assert for_device(capability) == ""


def test_units_are_told_apart() -> None:
    units = all_units()
    assert len({unit.name for unit in units}) == len(units)
