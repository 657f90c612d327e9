"""kill -9 of each model process under load: what callers get, what status says, the way back."""

from __future__ import annotations

import os
import signal
import time

from place import MODEL, Check, Load, Serving, demo_texts, same, samp, sample

GAP_S = 3.0
# A call that is in the process when it dies must not wait for ever.
HANG_S = 10.0


def campaign(serving: Serving) -> list[Check]:
    names = (f"tokenizer_{MODEL}", f"encoder_{MODEL}_fast", f"head_{MODEL}")
    before = sample(serving.grpc)
    return [_kill(serving, name, before) for name in names]


def _kill(serving: Serving, name: str, before: dict[str, object]) -> Check:
    load = Load(serving.grpc, f"{MODEL}_fast", 6, demo_texts(8))
    time.sleep(1.0)
    old = serving.stubs()
    (pid,) = old[name]
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    time.sleep(GAP_S)
    again = serving.stubs().get(name, [])
    code, status = serving.status()
    state = next(m["state"] for m in status["models"] if m["name"] == name)
    began = time.monotonic()
    back = samp("activate", serving.out, "--reload")
    mended = time.monotonic()
    time.sleep(0.5)
    load.stop()
    words = sorted({words[:150] for _, _, words in load.errors})
    waited = [seconds for _, seconds, _ in load.errors]
    last = max((when for when, *_ in load.errors), default=killed)
    # A call that began before the mend may still wait the seconds that its failure takes Triton.
    late = sum(when - seconds > mended + 0.2 for when, seconds, _ in load.errors)
    after = sum(when > mended for when, _ in load.answers)
    right = same(before, sample(serving.grpc))
    code_after, _ = serving.status()
    ok = (
        not again and state == "DEAD" and code == 1 and back.returncode == 0 and right
        and code_after == 0 and late == 0 and after > 0 and load.wrong == 0
        and max(waited, default=0.0) < HANG_S
    )  # fmt: skip
    role = name.partition("_")[0]
    return Check(
        "kill -9",
        f"of the {role}'s process under 6 callers",
        f"{len(load.errors)} calls failed until {last - killed:.1f} s after, each within "
        f"{max(waited, default=0):.2f} s; Triton starts no other process; samp status: {state}, "
        f"exit {code}; samp activate --reload: exit {back.returncode}, {mended - began:.1f} s; "
        f"answers {'as before' if right else 'CHANGED'}",
        ok,
        "make chaos CHAOS='--only kills'",
        {
            "errors": words, "failed": len(load.errors), "late": late, "wrong": load.wrong,
            "slowest_failure_s": round(max(waited, default=0.0), 2), "restarted_by_triton": again,
            "stderr": back.stderr[-300:] if back.returncode else "",
        },
    )  # fmt: skip
