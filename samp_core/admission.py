"""Refusing at once what would wait too long: the bound of a tier's queue, in seconds of its work.

Triton's own bound is a number of requests, and is met only when a request has been tokenized. Here
the encoder says how far it is (`Progress`: shared memory, one writer a slot, no lock), and the
tokenizer, the first step of every tier, knows what it let through since (`Gate`). What is waiting
is an estimate, and anything may die, be cancelled or be called directly meanwhile: so nothing is
counted back. What the encoder took, what is old, and all that was sent to an encoder that has
nothing to do is dropped, and an error lasts a moment only.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from samp_core.model_config import MAX_BATCH, OF_TIER, QUEUE_S, TOKENIZER_BATCH

SHM = Path("/dev/shm")
INSTANCES = 16
# A slot: rows taken so far, rows a second, when the running batch began (0: none), when one ended,
# how often a process took the slot over, when the queue was last seen empty.
FIELDS = 6
_TAKEN, _RATE, _BEGAN, _ENDED, _STARTS, _EMPTY = range(FIELDS)
# The rate is a mean over about so many rows: single texts do not hide what full batches reach.
_MEAN_ROWS = 512
# One batch runs and two wait: an encoder that is never idle has its full throughput.
LEAST_ROWS = 2 * MAX_BATCH
# So many may wait whatever is in them: our clients send no more of a file at once by default.
LEAST_REQUESTS = 16
# Refusals alone leave the tokenizer at most once in so long: handing a batch over takes Triton and
# the model five times the work of one more refusal in it. 10 ms cost more answers at five times
# the peak, 50 saved none: make chaos CHAOS="--only overload".
REFUSE_EVERY_S = 0.03
# What was sent so many times `queue_s` ago is not in it, whatever became of it.
HARD_LIMIT = 30
# What was sent so long before the queue was empty is not in it, wherever it went.
_ON_THE_WAY_S = 0.25
# Triton hands over what waits as soon as a batch has ended. A pause of so long, and then a batch
# that had room for as much again: nothing waited.
_PAUSE_S = 0.005


class Progress:
    """How far the encoder of one tier is; its processes write it, the tokenizer's read it."""

    def __init__(self, path: Path, slot: int = 0) -> None:
        """Raises OSError where there is no such memory."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            size = 8 * FIELDS * INSTANCES
            os.ftruncate(descriptor, size)
            memory = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        self._slots = memoryview(memory).cast("d")
        mine = FIELDS * (slot % INSTANCES)
        self._mine = self._slots[mine : mine + FIELDS]
        self._rows = self._seconds = 0.0

    def begin(self, rows: int) -> None:
        """A batch is taken out of the queue."""
        now = time.monotonic()
        if rows <= MAX_BATCH // 2 and now - self._mine[_ENDED] >= _PAUSE_S:
            self._mine[_EMPTY] = now
        self._mine[_TAKEN] += rows
        self._mine[_BEGAN] = now

    def end(self, rows: int) -> None:
        now = time.monotonic()
        if rows:
            kept = 0.5 ** (rows / _MEAN_ROWS)
            self._rows = kept * self._rows + rows
            self._seconds = kept * self._seconds + now - self._mine[_BEGAN]
            self._mine[_RATE] = self._rows / max(self._seconds, 1e-9)
        self._mine[_BEGAN] = 0.0
        self._mine[_ENDED] = now

    def reset(self) -> None:
        """At load: a process that died in a batch left its slot as it was."""
        self._mine[_RATE] = 0.0
        self._mine[_STARTS] += 1
        self.end(0)

    @property
    def taken(self) -> float:
        """Rows that all instances have taken."""
        return sum(self._all(_TAKEN))

    @property
    def starts(self) -> float:
        return sum(self._all(_STARTS))

    @property
    def rate(self) -> float:
        """Rows a second of all instances while they work; 0: not known."""
        return sum(self._all(_RATE))

    def empty(self, now: float) -> float:
        """When its queue was last seen empty."""
        idle = not any(self._all(_BEGAN)) and max(self._all(_ENDED)) <= now - _ON_THE_WAY_S
        return now if idle else max(self._all(_EMPTY))

    def _all(self, field: int) -> list[float]:
        """One field of every slot."""
        return [float(value) for value in self._slots[field::FIELDS]]


class Gate:
    """What one tokenizer process let through to one tier. share: of all that the tier gets."""

    def __init__(self, progress: Progress, limit_s: float, share: float = 1.0) -> None:
        self._progress = progress
        self.limit_s = limit_s
        self._share = share
        self._sent: deque[tuple[float, float]] = deque()  # when, rows
        self._waiting = self._rate = self._now = 0.0
        self._taken = progress.taken
        self._starts = progress.starts

    def admit(self, rows: int) -> float | None:
        """None, and the rows count as sent; or the seconds of work that wait already: refuse."""
        many = len(self._sent) >= self._share * LEAST_REQUESTS
        if many and self._waiting >= self._share * LEAST_ROWS and self._rate > 0:
            waits_s = self._waiting / self._rate
            if waits_s >= self.limit_s:
                return waits_s
        self._sent.append((self._now, rows))
        self._waiting += rows
        return None

    def settle(self) -> None:
        """See how far the encoder is: once for all requests that came together."""
        self._now = now = time.monotonic()
        self._rate = self._share * self._progress.rate
        starts, taken = self._progress.starts, self._progress.taken
        if starts != self._starts:  # what was sent to the process before this one is not known
            self._sent.clear()
        self._starts = starts
        gone = self._share * (taken - self._taken)
        self._taken = taken
        while gone > 0 and self._sent:
            when, rows = self._sent.popleft()
            self._waiting -= min(rows, gone)
            if rows > gone:
                self._sent.appendleft((when, rows - gone))
            gone -= rows
        empty = self._progress.empty(now) - _ON_THE_WAY_S
        oldest = max(empty, now - HARD_LIMIT * self.limit_s)
        while self._sent and self._sent[0][0] < oldest:
            self._waiting -= self._sent.popleft()[1]
        if not self._sent:
            self._waiting = 0.0


class Gates:
    """Those of one tokenizer process: the output that a tier asks for -> its gate."""

    def __init__(self, gates: Mapping[str, Gate]) -> None:
        self._gates = dict(gates)
        self._refused_at = 0.0

    def __contains__(self, output: str) -> bool:
        return output in self._gates

    def limit_s(self, output: str) -> float:
        return self._gates[output].limit_s

    def admit(self, requests: Sequence[tuple[str, int] | None]) -> list[float | None]:
        """The output and the rows of each request that came; None: not of a tier, it passes.

        As Gate.admit for each. Where the batch is of tiers that are full, and of nothing else, and
        there is room for more in it, it is held until the last one of that kind is long enough ago.
        """
        for name in {request[0] for request in requests if request is not None}:
            self._gates[name].settle()
        waits = [None if one is None else self._gates[one[0]].admit(one[1]) for one in requests]
        full = {one[0] for one, wait in zip(requests, waits, strict=True) if one and wait}
        room = sum(one[1] for one in requests if one is not None) < TOKENIZER_BATCH
        if full and room and all(one is not None and one[0] in full for one in requests):
            early = self._refused_at + REFUSE_EVERY_S - time.monotonic()
            if early > 0:
                time.sleep(early)
            self._refused_at = time.monotonic()
        return waits


def progress(args: Mapping[str, str]) -> Progress | None:
    """For an encoder to write. Each instance has its slot, and the copy that is loaded beside a
    model during an activation writes into the same.
    """
    number = args["model_instance_name"].rpartition("_")[2]
    made = _open(args["model_name"].removeprefix("next."), int(number) if number.isdigit() else 0)
    if made is not None:
        made.reset()
    return made


def gates(args: Mapping[str, str], outputs: Sequence[str]) -> Gates:
    """For a tokenizer. `args` are Triton's."""
    config = json.loads(args["model_config"])
    limit_s = float(config["parameters"].get("queue_s", {}).get("string_value", QUEUE_S))
    instances = sum(group["count"] for group in config["instance_group"])
    model = args["model_name"].removeprefix("next.").removeprefix("tokenizer_")
    found = {}
    for name in outputs:
        if name.startswith(OF_TIER):
            read = _open(f"encoder_{model}_{name.removeprefix(OF_TIER)}")
            if read is not None:
                found[name] = Gate(read, limit_s, 1 / instances)
    return Gates(found)


def _open(encoder: str, slot: int = 0) -> Progress | None:
    """That of a model in the Triton whose child this process is; None without /dev/shm."""
    try:
        return Progress(SHM / f"{_prefix(os.getppid())}queue_{encoder}", slot)
    except OSError:
        return None


def remove(encoder: str) -> None:
    """What `progress` made: for a parent that is no Triton, and removes no regions."""
    (SHM / f"{_prefix(os.getppid())}queue_{encoder}").unlink(missing_ok=True)


def _prefix(triton: int) -> str:
    """The name that this Triton's regions begin with: whoever removes those, removes ours."""
    for word in Path(f"/proc/{triton}/cmdline").read_text(errors="replace").split("\0"):
        if "shm-region-prefix-name=" in word:
            return word.rpartition("=")[2] + "_"
    # One that somebody else started: its process number is its own in its container only.
    started = Path(f"/proc/{triton}/stat").read_text().rpartition(")")[2].split()[19]
    which = f"{os.stat('/proc/self/ns/pid').st_ino} {triton} {started}"
    return f"samp-{hashlib.sha256(which.encode()).hexdigest()[:12]}_"
