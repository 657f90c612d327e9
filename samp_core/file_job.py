"""Every row of a file answered into another, in order: `samp predict --in FILE --out OUT`.

Answers go to OUT.part, which becomes OUT when it is whole; OUT.job says what it is made of. What
counts as done is read from OUT.part itself, line by line, so a kill at any moment costs the rows
in flight and nothing else. Failed rows are done again into OUT.redo, which then becomes OUT.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from samp_core import questions
from samp_core.errors import SampError
from samp_core.rows import Text

# Lines that wait for an answer before them; then the source is asked to wait.
_MOST_WAITING = 20_000
_FLUSH_S = 0.2
# So many rows in a row that the server failed: it is broken, and the rest would fail, too.
_MOST_FAULTS = 512
_ANSWERED = b'"error": null}\n'


class Outcome(Protocol):
    """A `samp_client.Outcome`: `answer` has fields() and truncated, `error` a code."""

    @property
    def answer(self) -> Any: ...
    @property
    def error(self) -> Any: ...


Stream = Callable[[Iterable[Text | None]], AsyncIterator[Outcome]]
"""The answers to texts, in their order; None asks for what has come to be sent."""


@dataclass(frozen=True)
class Source:
    """The input as it was when the job began, or went on."""

    path: Path
    rows: int
    sha256: str
    stamp: tuple[int, int, int]


@dataclass(frozen=True)
class Kept:
    """The whole lines at the beginning of a file of answers."""

    rows: int
    size: int
    failed: int


def survey(path: Path) -> Source:
    """Hash the input and count its rows; a first row that cannot be read is a SampError."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise SampError(
            "data_file", f"{path}: {error.strerror}", "a file of rows", "check the path"
        ) from None
    first = next(questions.rows_of(path), None)
    if first is None:
        raise SampError("data_empty", f"{path}: no rows", "rows with text", "give rows")
    if isinstance(first, SampError):
        raise first
    return Source(path, questions.count_rows(path), digest.hexdigest(), _stamp(found))


class Job:
    """One OUT, locked for this process. `rows` are its whole lines, `failed` those with errors."""

    def __init__(self, source: Source, out: Path, asked: str) -> None:
        """asked: which ensemble answers.

        SampError: OUT is of another input or ensemble, no job's, or being written by another.
        """
        self.source = source
        self.out = out
        self._facts = {"schema": 1, "sha256": source.sha256, "rows": source.rows, "asked": asked}
        self._record = _beside(out, "job")
        try:
            self._lock = os.open(self._record, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise SampError(
                "out_file", f"{self._record}: {error.strerror}", "a place to write", "mend --out"
            ) from None
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._lock)

    def _open(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            given = f"{self.out} is being written by another samp predict"
            raise SampError("out_in_use", given, "one at a time", "wait for it") from None
        known = _read_record(os.pread(self._lock, 65536, 0))
        part = _beside(self.out, "part")
        if known is None:
            if self.out.exists():
                raise SampError(
                    "out_exists", f"{self.out} exists and no {self._record.name} beside it",
                    "a new file, or one that this command began", "remove it or name another",
                )  # fmt: skip
            part.unlink(missing_ok=True)
            _beside(self.out, "redo").unlink(missing_ok=True)
            self._note(False)
        else:
            self._compare(known)
        finished = self.out.exists()
        if finished and part.exists():
            raise SampError(
                "out_exists", f"both {self.out} and {part}", "the one that is still written",
                f"remove {self.out}",
            )  # fmt: skip
        kept = _kept(self.out if finished else part)
        if finished and kept.rows != self.source.rows:
            raise SampError(
                "out_changed", f"{self.out} has {kept.rows} whole rows of {self.source.rows}",
                "the file as this command wrote it", f"remove it and {self._record.name}",
            )  # fmt: skip
        self._done = finished
        self.rows, self.failed = kept.rows, kept.failed
        if not finished:
            with part.open("ab") as file:
                file.truncate(kept.size)

    def _compare(self, known: dict[str, Any]) -> None:
        again = f"name another --out, or remove {self.out}* to begin again"
        if known.get("sha256") != self.source.sha256:
            raise SampError(
                "input_changed", f"{self.source.path} is not what {self.out} was begun with",
                f"the same {known.get('rows')} rows, SHA-256 {str(known.get('sha256'))[:12]}...",
                again,
            )  # fmt: skip
        if known.get("asked") != self._facts["asked"]:
            given = f"{self.out} was begun with {known.get('asked')}, not {self._facts['asked']}"
            raise SampError("other_tier", given, "the same model and tier", again)

    async def answer(self, stream: Stream, progress: Callable[[int], None]) -> None:
        """The rows that are missing. progress is told how many rows are done."""
        if self._done:
            return
        part = _beside(self.out, "part")
        rows = questions.rows_of(self.source.path, self.rows)
        plan = ((index, None, row) for index, row in enumerate(rows, self.rows))
        await self._write(part, plan, stream, progress)
        self._finish(part)

    async def redo(self, stream: Stream, progress: Callable[[int], None]) -> None:
        """The rows that failed, asked once more."""
        redo = _beside(self.out, "redo")
        kept = _kept(redo)
        with redo.open("ab") as file:
            file.truncate(kept.size)
        self.rows, self.failed = kept.rows, kept.failed
        with self.out.open("rb") as lines:
            both = zip(lines, questions.rows_of(self.source.path), strict=True)
            plan = (
                (index, line if line.endswith(_ANSWERED) else None, row)
                for index, (line, row) in enumerate(islice(both, kept.rows, None), kept.rows)
            )
            await self._write(redo, plan, stream, progress)
        self._finish(redo)

    async def _write(
        self,
        path: Path,
        plan: Iterable[tuple[int, bytes | None, Text | SampError]],
        stream: Stream,
        progress: Callable[[int], None],
    ) -> None:
        """Append a line for each (index, line that is known already or None, row)."""
        waiting: deque[bytes | tuple[int, Text]] = deque()
        faults = 0
        with path.open("ab") as file:
            lines = _Lines(file, self, progress)

            def asked() -> Iterator[Text | None]:
                for index, line, row in plan:
                    if line is None and isinstance(row, SampError):
                        line = _line({"index": index, "text": None, "error": str(row)})
                    if line is not None:
                        waiting.append(line)
                        lines.settle(waiting)
                    elif not isinstance(row, SampError):
                        waiting.append((index, row))
                        yield row
                    while len(waiting) > _MOST_WAITING:
                        yield None

            answers = stream(asked())
            async with contextlib.aclosing(answers):  # type: ignore[type-var]
                async for outcome in answers:
                    lines.settle(waiting)
                    index, row = waiting[0]
                    error = outcome.error
                    if error is not None and error.code == "unavailable":
                        raise self._stopped(str(error))
                    waiting[0] = _line(answer_fields(index, row, outcome))  # type: ignore[arg-type]
                    lines.settle(waiting)
                    # Of a wrong row only the row is at fault.
                    mine = error is None or error.code not in ("server_fault", "deadline_exceeded")
                    faults = 0 if mine else faults + 1
                    if faults == _MOST_FAULTS:
                        raise self._stopped(f"{faults} rows running failed: {error}")
            lines.settle(waiting)
            file.flush()
            os.fsync(file.fileno())

    def _stopped(self, why: str) -> SampError:
        return SampError(
            "stopped", f"{self.rows} of {self.source.rows} rows are answered; then {why}", "",
            "mend that and run the same command to go on",
        )  # fmt: skip

    def _finish(self, path: Path) -> None:
        if not self.source.path.exists() or _stamp(self.source.path.stat()) != self.source.stamp:
            raise SampError(
                "input_changed", f"{self.source.path} was written to while it was read",
                "an input that stays as it is", f"remove {self._record} and {path} to begin again",
            )  # fmt: skip
        os.replace(path, self.out)
        self._done = True
        self._note(True)
        _sync(self.out.parent)

    def _note(self, done: bool) -> None:
        """Write OUT.job in place: it carries the lock. A reader takes its first line."""
        line = json.dumps({**self._facts, "done": done}).encode() + b"\n"
        os.pwrite(self._lock, line, 0)
        os.ftruncate(self._lock, len(line))
        os.fsync(self._lock)


class _Lines:
    """Appends lines, and hands them to the system a few times a second."""

    def __init__(self, file: BinaryIO, job: Job, progress: Callable[[int], None]) -> None:
        self._file = file
        self._job = job
        self._progress = progress
        self._flushed = time.monotonic()

    def settle(self, waiting: deque[Any]) -> None:
        """Write the lines in front of the first row that has no answer yet."""
        while waiting and isinstance(waiting[0], bytes):
            line = waiting.popleft()
            self._file.write(line)
            self._job.rows += 1
            self._job.failed += not line.endswith(_ANSWERED)
        now = time.monotonic()
        if now - self._flushed > _FLUSH_S:
            self._flushed = now
            self._file.flush()
            self._progress(self._job.rows)


def answer_fields(index: int, row: Text, outcome: Outcome) -> dict[str, Any]:
    """A line of `samp predict --json`: index, text, the answer's fields, error."""
    parts = (row,) if isinstance(row, str) else row
    found: dict[str, Any] = {
        "index": index,
        **dict(zip(("text", "text_pair"), parts, strict=False)),
    }
    if outcome.answer is not None:
        found.update(truncated=outcome.answer.truncated, **outcome.answer.fields())
    found["error"] = None if outcome.error is None else str(outcome.error)
    return found


def _line(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode(errors="replace") + b"\n"


def _kept(path: Path) -> Kept:
    """The lines that are whole and in their place; after a power cut anything may follow them."""
    rows = size = failed = 0
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for line in file:
            if not (line.startswith(b'{"index": %d, ' % rows) and line.endswith(b"}\n")):
                break
            rows += 1
            size += len(line)
            failed += not line.endswith(_ANSWERED)
    return Kept(rows, size, failed)


def _read_record(content: bytes) -> dict[str, Any] | None:
    try:
        known = json.loads(content.partition(b"\n")[0])
    except ValueError:
        return None
    return known if isinstance(known, dict) else None


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f"{out.name}.{what}")


def _stamp(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_ino, found.st_size, found.st_mtime_ns


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
