"""The output folder: same content, same build; nothing half-written is ever current."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from tiny import LABELS, tiny_weights, write_tiny

from samp_core import model_config
from samp_core.errors import SampError, UsageError
from samp_core.manifest import check_folder, file_sha256
from samp_core.plan import Plan
from samp_core.repository import activate, build_lock, read_manifest, verify

TESTS = Path(__file__).resolve().parents[1]


def test_the_folder_is_the_one_of_the_contract(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, tiers=("exact", "fast"), default_tier="fast")
    assert (tmp_path / "current").is_symlink()
    assert os.readlink(tmp_path / "current") == f"builds/{folder.name}"
    assert sorted(p.name for p in folder.iterdir()) == ["build.json", "manifest.json", "models"]
    body = json.loads((folder / "manifest.json").read_text())
    assert body["schema"] == 1
    assert (body["model"], body["task"]) == ("tiny", "classification")
    assert (body["labels"], body["max_length"]) == (list(LABELS), 32)
    assert body["default_tier"] == "fast"
    assert body["tiers"]["fast"]["ensemble"] == "tiny_fast"
    assert body["tiers"]["fast"]["encoder"] == "encoder_tiny_fast"
    models = sorted(p.name for p in (folder / "models").iterdir())
    encoders, ensembles = ["encoder_tiny_exact", "encoder_tiny_fast"], ["tiny_exact", "tiny_fast"]
    assert models == [*encoders, "head_tiny", *ensembles, "tokenizer_tiny"]
    order = ["tokenizer_tiny", *encoders, "head_tiny", *ensembles]
    assert read_manifest(tmp_path).models() == order
    on_disk = {str(p.relative_to(folder)) for p in (folder / "models").rglob("*") if p.is_file()}
    assert set(body["files"]) == on_disk
    for model in models:
        config = model_config.from_pbtxt((folder / "models" / model / "config.pbtxt").read_text())
        assert config.name == model


def test_an_encoder_folder_holds_its_plan_weights_and_hashes(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, seed=3) / "models/encoder_tiny_exact/1"
    hashes = json.loads((folder / "sha256.json").read_text())
    files = {p.name for p in folder.iterdir()} - {"sha256.json"}
    assert files == {"model.py", "plan.json", "encoder.json", "weights.safetensors"} == set(hashes)
    assert all(file_sha256(folder / name) == sha256 for name, sha256 in hashes.items())
    stored, made = load_file(folder / "weights.safetensors"), tiny_weights(3)
    assert stored.keys() == made.keys()
    assert all((stored[name] == made[name]).all() for name in made)
    plan = Plan.from_json((folder / "plan.json").read_text())
    assert read_manifest(tmp_path).tiers["exact"].plan_sha256 == plan.key()


def test_the_same_content_is_the_same_build(tmp_path: Path) -> None:
    first = write_tiny(tmp_path, seed=1)
    inode = (first / "manifest.json").stat().st_ino
    second = write_tiny(tmp_path, seed=2)
    assert second != first
    assert write_tiny(tmp_path, seed=1) == first
    assert (first / "manifest.json").stat().st_ino == inode
    assert read_manifest(tmp_path).folder == first
    assert len(list((tmp_path / "builds").iterdir())) == 2


def test_a_damaged_build_is_written_again_beside_itself(tmp_path: Path) -> None:
    first = write_tiny(tmp_path)
    weights = first / "models/encoder_tiny_exact/1/weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    second = write_tiny(tmp_path)
    assert second != first
    verify(read_manifest(tmp_path))


def test_activation_makes_every_config_newer(tmp_path: Path) -> None:
    """Triton takes a model for changed only when its newest file became newer."""
    first = write_tiny(tmp_path, seed=1)
    second = write_tiny(tmp_path, seed=2)
    newest = max(p.stat().st_mtime_ns for p in second.rglob("*"))
    activate(tmp_path, first)
    configs = list(first.glob("models/*/config.pbtxt"))
    assert len(configs) == 4
    assert all(path.stat().st_mtime_ns > newest for path in configs)
    assert (tmp_path / "current").resolve() == first


def test_the_last_builds_are_kept_to_go_back_to(tmp_path: Path) -> None:
    first = write_tiny(tmp_path, seed=1)
    second, third = write_tiny(tmp_path, seed=2), write_tiny(tmp_path, seed=3)
    assert {p.name for p in (tmp_path / "builds").iterdir()} == {
        build.name for build in (first, second, third)
    }
    activate(tmp_path, first)
    fourth = write_tiny(tmp_path, seed=4)
    kept = {p.name for p in (tmp_path / "builds").iterdir()}
    assert kept == {first.name, third.name, fourth.name}
    assert (tmp_path / "current").resolve() == fourth
    for build in (first, third, fourth):
        activate(tmp_path, build)
        verify(read_manifest(tmp_path))


@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "removed"])
@pytest.mark.parametrize("name", ["weights.safetensors", "plan.json"])
def test_damage_names_model_and_file(tmp_path: Path, name: str, damage: str) -> None:
    folder = write_tiny(tmp_path) / "models/encoder_tiny_exact/1"
    path = folder / name
    content = bytearray(path.read_bytes())
    if damage == "removed":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    manifest = read_manifest(tmp_path)
    with pytest.raises(SampError, match=rf"model encoder_tiny_exact: .*{name}") as caught:
        verify(manifest)
    assert caught.value.code == "damaged_repository"
    with pytest.raises(SampError, match=name):
        check_folder(folder)
    verify(manifest, models=["tokenizer_tiny", "head_tiny", "tiny_exact"])


def test_reading_without_a_good_build(tmp_path: Path) -> None:
    with pytest.raises(SampError, match="no_build"):
        read_manifest(tmp_path)
    with pytest.raises(SampError, match="no_build"):
        read_manifest(tmp_path / "absent")
    folder = write_tiny(tmp_path)
    path = folder / "manifest.json"
    good = path.read_text()
    for text, code in (
        (good.replace('"schema": 1', '"schema": 99'), "wrong_schema"),
        (good[: len(good) // 2], "damaged_repository"),
        ("[1]", "damaged_repository"),
        ('{"schema": 1}', "damaged_repository"),
    ):
        path.write_text(text)
        with pytest.raises(SampError) as caught:
            read_manifest(tmp_path)
        assert caught.value.code == code
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(SampError, match=r"damaged_repository.*manifest\.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["Films", "films_2", "", "fi lms", "../films", "films\n", "é"])
def test_names_are_checked_before_anything_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="bad_name"):
        write_tiny(tmp_path, model=name)
    with pytest.raises(UsageError, match="bad_name"):
        write_tiny(tmp_path, tiers=(name,), default_tier=name)
    assert not (tmp_path / "current").exists()
    assert not list(tmp_path.glob("builds/*"))


def test_unknown_tiers_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="balanced"):
        write_tiny(tmp_path, default_tier="balanced")
    write_tiny(tmp_path, tiers=("exact", "fast"))
    manifest = read_manifest(tmp_path)
    assert manifest.models(["fast"])[1:2] == ["encoder_tiny_fast"]
    with pytest.raises(SampError, match=r"'quick'.*exact, fast"):
        manifest.models(["fast", "quick"])


def test_a_second_build_names_the_first(tmp_path: Path) -> None:
    with build_lock(tmp_path), pytest.raises(SampError) as caught, build_lock(tmp_path):
        pass
    assert caught.value.code == "busy"
    assert caught.value.exit_code == 1
    assert f"pid {os.getpid()}" in str(caught.value)
    with build_lock(tmp_path):  # free again
        pass


def test_an_out_that_cannot_be_written_is_bad_usage(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="bad_out"), build_lock(tmp_path / "file" / "out"):
        pass


_BUILDER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from tiny import write_tiny
for seed in range({first}, {first} + 200):
    write_tiny(Path({out!r}), seed=seed, tiers=("exact", "fast"))
    print("built", flush=True)
"""


def test_kill_9_at_any_moment_leaves_a_whole_repository(tmp_path: Path) -> None:
    """Builds that never stop, killed 20 times: what is current is always complete."""
    write_tiny(tmp_path)
    seen = set()
    rng = random.Random(5)
    for attempt in range(20):
        code = _BUILDER.format(tests=str(TESTS), out=str(tmp_path), first=1 + 200 * attempt)
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout is not None
        with process.stdout as stream:
            assert stream.readline() == b"built\n"
            time.sleep(rng.uniform(0.0, 0.15))
            process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        manifest = read_manifest(tmp_path)
        verify(manifest)
        seen.add(manifest.folder.name)
    assert len(seen) == 20  # each had built something, so that the kills came between and within
    folder = write_tiny(tmp_path, seed=1_000_000)
    assert read_manifest(tmp_path).folder == folder
    left = [p for p in tmp_path.rglob("*") if p.name.endswith(".partial")]
    assert left == []
