"""Whether a build fits the machine that serves it: refused, said, or nothing to say."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import samp_kernels.cpu
from forked import forks
from separable import planted_build, small
from tiny import write_tiny

from samp_core import fits
from samp_core.backends import cpu_backend
from samp_core.config import load_config
from samp_core.device import device
from samp_core.errors import SampError, UsageError
from samp_core.manifest import read_manifest
from samp_core.plan import Plan, Recipe, SitePlan


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build made here, with one tier beside exact."""
    out = tmp_path_factory.mktemp("built")
    yaml = small().yaml(out / "build.yaml", out=str(out), tiers={"fast": {"drop": 8}}, threads=1)
    assert planted_build(yaml, out).code == 0
    return out


def made_on(out: Path, tier: str, **changes: str) -> None:
    """Write another device into a tier's plan."""
    manifest = read_manifest(out)
    file = manifest.folder / "models" / manifest.tiers[tier].encoder / "1" / "plan.json"
    plan = json.loads(file.read_text())
    plan["device"] |= changes
    file.write_text(json.dumps(plan))


def test_a_build_of_this_machine_has_nothing_to_say(built: Path) -> None:
    assert fits.check(built, read_manifest(built)) == []


def test_another_cpu_is_said_with_the_command_that_plans_again(built: Path) -> None:
    here = device(1)
    was = {key: str(here[key]) for key in ("cpu", "isa")}
    made_on(built, "fast", cpu="Another CPU", isa="sse9")
    try:
        (note,) = fits.check(built, read_manifest(built))
        assert fits.check(built, read_manifest(built), ["exact"]) == []
    finally:
        made_on(built, "fast", **was)
    assert "the plans of fast were made on cpu Another CPU, isa sse9" in note
    assert f"this is cpu {here['cpu']}, isa {here['isa']}: they answer rightly" in note
    command = note.rpartition("plan again: ")[2].split()
    record = built / "current" / "build.json"
    assert command == ["samp", "build", "-c", str(record), "--out", str(built)]
    # It asks for the same build, but on this machine's threads, and runs.
    again, first = load_config(record, {}), load_config(built / "build.yaml", {})
    assert again.model_copy(update={"threads": 1}) == first
    done = forks().samp(*command[1:], "--threads", 1)
    assert done.code == 0, done
    assert fits.check(built, read_manifest(built)) == []


def test_kernels_that_are_not_built_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny(tmp_path, tiers=("exact", "fast"), backend="cpu")
    monkeypatch.setattr(samp_kernels.cpu, "missing", lambda: "the native kernels are not built")
    with pytest.raises(SampError) as caught:
        fits.check(tmp_path, read_manifest(tmp_path), ["fast"])
    assert caught.value.code == "unsupported_plan"
    assert caught.value.given == "tier fast of tiny: backend cpu: the native kernels are not built"
    assert caught.value.fix.startswith("plan again here: samp build --model CHECKPOINT --data ROWS")
    assert "--backend auto" in caught.value.fix
    assert samp_kernels.cpu.MEND in caught.value.fix


def test_int8_of_onednn_needs_vnni() -> None:
    plan = Plan("0" * 64, {"layers": 1}, "onednn", {}, {"layer.0.out": SitePlan("int8", Recipe())})
    assert fits.lacking(plan, {"isa": "avx2"})[0] == "backend onednn: int8 on avx2, without VNNI"
    assert fits.lacking(plan, {"isa": "avx512_vnni"}) == ("", "")
    assert fits.lacking(replace(plan, sites={}), {"isa": "avx2"}) == ("", "")
    assert "none of cpu, cuda" in fits.lacking(replace(plan, backend="tpu"), {})[0]


def test_a_record_without_a_configuration(tmp_path: Path) -> None:
    """What samp generate writes: nothing says how its plans were asked for."""
    record = tmp_path / "build.json"
    record.write_text(json.dumps({"generated_from": {}}))
    with pytest.raises(UsageError, match="holds no configuration"):
        load_config(record, {})
    record.write_text("{")
    with pytest.raises(UsageError, match=r"bad_config: .*build\.json"):
        load_config(record, {})


def test_it_brings_no_torch(tmp_path: Path) -> None:
    write_tiny(tmp_path, backend=cpu_backend())
    code = (
        "import sys\nfrom pathlib import Path\nfrom samp_core import fits, manifest\n"
        "out = Path(sys.argv[1])\nassert fits.check(out, manifest.read_manifest(out)) == []\n"
        "assert not {'torch', 'cupy', 'pydantic'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
