"""The cache: what is found is what was made, and nothing damaged is ever found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samp_kernels.interface import Array

from samp_core import cache
from samp_core.cache import Cache, clean, code_sha256

VALUES = {"b": [1, 2.5, None, "ü"], "a": {"x": 0.1 + 0.2}}


class Maker:
    """Counts how often it makes something."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.made = 0

    def __call__(self) -> Any:
        self.made += 1
        return self.value


def entry(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def test_json_is_made_once(tmp_path: Path) -> None:
    store, make = Cache(tmp_path / "cache"), Maker(VALUES)
    for _ in range(3):
        assert store.json("latency", {"k": 1}, make) == VALUES
    assert make.made == 1
    assert (store.hits, store.misses) == (2, 1)
    # Another process finds it too.
    assert Cache(tmp_path / "cache").json("latency", {"k": 1}, pytest.fail) == VALUES


def test_arrays_are_made_once(tmp_path: Path) -> None:
    arrays: dict[str, Array] = {
        "layer.0.qkv": np.arange(6, dtype=np.float32).reshape(2, 3),
        "layer.0.qkv.amax": np.array([np.pi]),
        "counts": np.array([2**40, -1]),
        "empty": np.zeros((0, 4)),
    }
    store, make = Cache(tmp_path), Maker(arrays)
    for _ in range(2):
        got = store.arrays("ranges", {"k": 1}, make)
        assert got.keys() == arrays.keys()
        for name, array in arrays.items():
            assert got[name].dtype == array.dtype
            assert np.array_equal(got[name], array)
    assert make.made == 1
    assert (store.hits, store.misses) == (1, 1)


def test_the_first_answer_equals_the_second(tmp_path: Path) -> None:
    """JSON turns keys into text and tuples into lists: at once, not only when read back."""
    store, make = Cache(tmp_path), Maker({1: (2, 3)})
    first, second = store.json("x", {}, make), store.json("x", {}, make)
    assert first == second == {"1": [2, 3]}


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("other", {"plan": "a", "n": 1}),
        ("kind", {"plan": "b", "n": 1}),
        ("kind", {"plan": "a", "n": 2}),
        ("kind", {"plan": "a", "n": 1, "code": "new"}),
        ("kind", {"plan": "a"}),
        ("kind", {"plan": "a", "n": "1"}),
        ("kind", {}),
    ],
)
def test_another_key_is_another_entry(kind: str, key: dict[str, Any], tmp_path: Path) -> None:
    store = Cache(tmp_path)
    store.json("kind", {"plan": "a", "n": 1}, Maker("first"))
    assert store.json(kind, key, Maker("second")) == "second"
    assert store.json("kind", {"n": 1, "plan": "a"}, pytest.fail) == "first"
    assert (store.hits, store.misses) == (1, 2)


def flip(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda content: b"",
        lambda content: content[:10],
        lambda content: content[:32],
        lambda content: content[:-1],
        lambda content: content + b" ",
        lambda content: bytes([content[0] ^ 1]) + content[1:],
        lambda content: content[32:],
    ],
)
@pytest.mark.parametrize("form", ["json", "arrays"])
def test_a_damaged_entry_is_made_again(
    form: str, damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    store = Cache(tmp_path)
    make = Maker({"x": np.arange(3)} if form == "arrays" else {"x": 1})
    get = getattr(store, form)
    get("kind", {"k": 1}, make)
    file = entry(tmp_path)
    content = file.read_bytes()
    file.write_bytes(damage(content))
    again = get("kind", {"k": 1}, make)
    assert np.array_equal(again["x"], make.value["x"])
    assert (make.made, store.hits, store.misses) == (2, 0, 2)
    get("kind", {"k": 1}, make)
    assert make.made == 2, "the damaged entry was not replaced"


def test_a_failed_make_leaves_nothing(tmp_path: Path) -> None:
    store = Cache(tmp_path / "cache")

    def fail() -> Any:
        raise RuntimeError("half-way")

    for get in (store.json, store.arrays):
        with pytest.raises(RuntimeError, match="half-way"):
            get("kind", {}, fail)
    assert not list(tmp_path.rglob("*"))
    assert store.json("kind", {}, Maker(1)) == 1


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_entry(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Cache(tmp_path)
    store.json("kind", {}, Maker("old"))
    before = entry(tmp_path).read_bytes()

    def full(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, step, full)
    entry(tmp_path).write_bytes(flip(before))
    with pytest.raises(OSError, match="no space"):
        store.json("kind", {}, Maker("new"))
    assert entry(tmp_path).read_bytes() == flip(before), "only the rename replaces an entry"


KILLED = """
import os, sys
from pathlib import Path
from samp_core.cache import Cache
store = Cache(Path(sys.argv[1]))
os.fsync = lambda descriptor: os._exit(9)
store.json("kind", {"k": 1}, lambda: "never whole")
"""


def test_killed_half_way(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)])
    assert done.returncode == 9
    assert entry(tmp_path).suffix == ".partial"
    store = Cache(tmp_path)
    assert store.json("kind", {"k": 1}, Maker("whole")) == "whole"
    assert len(list(tmp_path.iterdir())) == 2
    clean(tmp_path)
    assert entry(tmp_path).suffix == ".json"
    assert store.json("kind", {"k": 1}, pytest.fail) == "whole"


def test_cleaning_what_is_not_there(tmp_path: Path) -> None:
    clean(tmp_path / "nowhere")


def test_the_code_is_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file that decides what a pass computes; no other."""
    import shutil

    import samp_kernels

    import samp_core

    folders = {}
    for package in (samp_core, samp_kernels):
        name = package.__name__
        source = Path(str(package.__file__)).parent
        folders[name] = tmp_path / name
        shutil.copytree(source, folders[name], ignore=shutil.ignore_patterns("__pycache__"))
        monkeypatch.setattr(package, "__file__", str(folders[name] / "__init__.py"))
    before = code_sha256()
    assert before == code_sha256()
    core, kernels = folders["samp_core"], folders["samp_kernels"]
    for file in (
        *(kernels / "onednn.py", kernels / "interface.py"),
        *(core / "encoder.py", core / "quantize.py", core / "calibrate.py", core / "latency.py"),
        *(core / "checkpoint.py", core / "text.py", core / "heads" / "classification.py"),
    ):
        content = file.read_bytes()
        file.write_bytes(content + b"\n")
        assert code_sha256() != before, file.name
        file.write_bytes(content)
    (core / "doctor.py").write_text("# Decides nothing that is cached.")
    assert code_sha256() == before


def test_an_entry_is_a_digest_and_its_body(tmp_path: Path) -> None:
    Cache(tmp_path).json("kind", {}, Maker(VALUES))
    content = entry(tmp_path).read_bytes()
    assert cache.hashlib.sha256(content[32:]).digest() == content[:32]
    assert json.loads(content[32:]) == VALUES
