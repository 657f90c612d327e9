"""A fresh process that loads one encoder folder and answers once: how soon, and how large.

    python benchmarks/footprint.py FOLDER THREADS BEGUN TOKEN...

BEGUN is the caller's time.monotonic() before it started this process; the clock is the machine's.
`measure` is the caller.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def measure(folder: Path, threads: int, ids: Sequence[int], times: int) -> dict[str, Any]:
    """Medians over `times` processes: ready_s, rss_mb (resident), peak_mb, and whether torch came.

    One process runs first and is not counted: files are then in the system's cache.
    """
    found = []
    for _ in range(times + 1):
        command = [sys.executable, __file__, str(folder), str(threads), repr(time.monotonic())]
        done = subprocess.run(
            [*command, *map(str, ids)], check=True, stdout=subprocess.PIPE, text=True
        )
        found.append(json.loads(done.stdout))
    del found[0]
    middle = {
        key: round(statistics.median(one[key] for one in found), 3)
        for key in ("ready_s", "rss_mb", "peak_mb")
    }
    return {**middle, "n": times, "torch": found[0]["torch"]}


def main() -> None:
    folder, threads, begun = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])

    import numpy as np
    from samp_kernels.interface import pack_batch

    from samp_core.encoder_files import load_session

    session = load_session(folder, threads)
    ids = np.array([int(token) for token in sys.argv[4:]], dtype=np.int32)
    answer = session.run(pack_batch([ids], [np.zeros_like(ids)]), output="first")
    ready = time.monotonic() - begun
    assert np.isfinite(answer).all()
    status = Path("/proc/self/status").read_text()
    kilobytes = {
        name: int(value) for name, value in re.findall(r"^(Vm\w+):\s+(\d+) kB", status, re.M)
    }
    report = {
        "ready_s": ready,
        "rss_mb": kilobytes["VmRSS"] * 1024 / 1e6,
        "peak_mb": kilobytes["VmHWM"] * 1024 / 1e6,
        "torch": "torch" in sys.modules,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
