"""The buffers of sessions: what one pass writes, the next may overwrite.

Sessions that share weights share these too: they run one after another, on one stream.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from samp_kernels.cuda.launcher import Buffer
from samp_kernels.cuda.ops import Workspace, padded, size_of
from samp_kernels.cuda.tiles import room_for
from samp_kernels.interface import EncoderConfig

HALVES = ("fp16", "bf16")


def stream_of(precisions: Collection[str]) -> str:
    """The kind of the residual stream under a plan of these: 16 bits where no site is fp32."""
    halves = [half for half in HALVES if half in precisions]
    if "fp32" in precisions or len(halves) > 1:
        return "fp32"
    return halves[0] if halves else "fp16"


class Room:
    """Device memory and pinned memory for batches of up to `rows` tokens."""

    def __init__(
        self, backend: Any, config: EncoderConfig, rows: int, integers: int, classes: int
    ) -> None:
        """integers: the largest block of ids, bounds and work, in int32."""
        launcher, hidden = backend.launcher, config.hidden
        self.input: Buffer = launcher.allocate(4 * integers)
        self.host = launcher.pinned(4 * integers).view(np.int32)
        widths = {
            "residual": hidden,
            "sum": hidden,
            "qkv": 3 * hidden,
            "context": hidden,
            "feed": hidden,
            "ffn": config.ffn,
            "result": hidden,
            "logits": max(classes, 1),
        }
        self.buffers = {n: launcher.allocate(size_of(rows, w, "fp32")) for n, w in widths.items()}
        self.token_scale: Buffer = launcher.allocate(4 * padded(rows))
        self.answer = launcher.pinned(size_of(rows, max(hidden, classes), "fp32"))
        # Only small products are split over k: where they are not, tiles fill the device.
        sums, counters = room_for(min(rows, 1024), max(3 * hidden, config.ffn))
        space = Workspace(launcher.allocate(4 * sums), launcher.allocate(4 * counters))
        launcher.fill(space.counters, 0, 4 * counters)
        self.device = backend.device(space)
