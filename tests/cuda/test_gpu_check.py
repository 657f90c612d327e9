"""`make gpu-check` without a GPU: its script, from its files alone, through the emulator."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from emulated import needs_compiler

ROOT = Path(__file__).parents[2]
SCRIPT = "benchmarks/gpu_check.py"
CARRIED = ("kernels", SCRIPT, "benchmarks/gpu_import.py", "benchmarks/gpu_peers.py")


@needs_compiler
def test_the_script_runs_from_its_files_alone(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "cubins", "cpu", "emulated")
    for name in CARRIED:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
        else:
            shutil.copyfile(ROOT / name, tmp_path / name)
    carried = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert carried < 2 << 20
    out = tmp_path / "result.json"
    # Neither samp_kernels nor samp_core of the environment: only what was carried.
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)];"
        "sys.path[:] = [p for p in sys.path if 'editable' not in p];"
        f"sys.argv[0] = {str(tmp_path / SCRIPT)!r}; import runpy;"
        f"sys.path.insert(0, {str(tmp_path / 'benchmarks')!r});"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, "--emulate", "--out", str(out)]
    environment = {**os.environ, "SAMP_EMULATED": str(ROOT / "kernels" / "cuda" / "emulated")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    facts = json.loads(out.read_text())
    assert "emulated" in facts["device"]
    assert len(facts["checks"]) > 60
    assert all(check["ok"] for check in facts["checks"])
    assert "encoders" not in facts
