"""Our CPU encoder beside OpenVINO, ONNX Runtime and torch: one process, in turns, same tokens.

    python benchmarks/encoder.py [--rows bert-base/1x16 ...] [--backend cpu] [--quick]

BERT-base's shape (random weights) and MiniLM-L6, at fixed lengths and on real texts of mixed
length; our int8 GEMM by itself; a fresh encoder process. Peers are optional: what is absent is
named in the result. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import encoder_models
import encoder_rows
import footprint
import gemm_alone
import limits
import machine
import store
from encoder_models import Inputs, Model
from interleave import Contender, Pace, measure, pilot
from peers import padded, ready
from rich.console import Console
from rich.progress import Progress
from samp_kernels.interface import Backend, KernelError, Session

CONSOLE = Console(stderr=True)
THREADS = len(os.sched_getaffinity(0))
SHAPES = ("1x16", "1x32", "1x64", "1x128", "8x128", "mixed", "mixed-long")
ROWS = {
    "bert-base": (*SHAPES, "gemm"),
    "minilm-l6": (*SHAPES, "footprint"),
}
QUICK = Pace(rounds=2, turn_s=0.02, warm_s=0.0, calls=1)
PACKAGES = ("openvino", "nncf", "onnxruntime", "onnx", "onnxscript", "samp-triton")


def main() -> None:
    options = parse()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported, later
    rows_of = chosen_rows(options.rows)
    pace = QUICK if options.quick else Pace(rounds=options.rounds, turn_s=options.seconds)
    busy = machine.require_quiet(options.force or options.quick)
    load_before = os.getloadavg()
    threads = options.threads
    found = {count: limits.limits(count) for count in sorted({1, threads})}
    backend, refused = encoder_models.first_backend(options.backend, threads)
    run = Run(options, backend, threads, found, pace)
    run.not_run += refused.values()
    bystanders = machine.Bystanders(())
    stopped = False
    try:
        for name, wanted in rows_of.items():
            run.model(name, wanted)
    except KeyboardInterrupt:
        stopped = True
        run.not_run.append("the rows that are missing: stopped by hand")
    others = bystanders.share()
    every = {name: list(rows) for name, rows in ROWS.items()}
    whole = rows_of == every and not options.quick and not stopped
    folder = options.results or (machine.RESULTS if whole else store.FOLDER / "results")
    path = machine.write_result(
        "encoder",
        threads=threads,
        rows=run.rows,
        not_run=run.not_run,
        found_limits=found[threads],
        found_versions={**machine.versions(), **store.installed(PACKAGES)},
        folder=folder,
        backend=backend_name(backend),
        limits_one_thread=found[1],
        last_level_cache_mb=round(limits.last_level_cache() / 1e6, 1),
        pace=vars(pace),
        busy_before=round(busy, 3),
        others_share=round(others, 3),
        load_before=load_before,
        load_after=os.getloadavg(),
    )
    console = Console(width=None if sys.stdout.isatty() else 200)
    encoder_rows.show(run.rows, console)
    gops, vnni, gbps = (found[threads].get(n, 0) for n in ("int8_gops", "vnni_gops", "gbps"))
    tiles = f", without AMX tiles {vnni:.0f}" if gops > vnni else ""
    print(f"limits of {threads} threads: int8 {gops:.0f} GOP/s{tiles}, memory {gbps:.1f} GB/s")
    for line in run.not_run:
        print(f"not run: {line}")
    machine.report(path, others)


class Run:
    """One run: what is common to all rows, and the rows so far."""

    def __init__(
        self,
        options: argparse.Namespace,
        backend: Backend,
        threads: int,
        found: dict[int, dict[str, float]],
        pace: Pace,
    ) -> None:
        self.options = options
        self.backend = backend
        self.threads = threads
        self.found = found
        self.pace = pace
        self.rows: list[dict[str, Any]] = []
        self.not_run: list[str] = []

    def model(self, name: str, wanted: Sequence[str]) -> None:
        """All rows of one model; its sessions and the peers' live only as long."""
        try:
            model = encoder_models.load(name)
        except Exception as error:  # the package with its weights may be absent
            self.not_run.append(f"{name}: {error}")
            return
        shapes = [row for row in wanted if row in SHAPES]
        sessions = dict(self.sessions(model))
        try:
            if shapes:
                self.shapes(model, sessions, shapes)
            if "gemm" in wanted and "int8" in sessions:
                CONSOLE.print(f"bench: {name}: GEMMs")
                seconds = 0.02 if self.options.quick else 1.0
                self.rows += gemm_alone.rows(
                    model, self.backend, sessions["int8"], self.found, seconds, lambda: None
                )
        finally:
            for session in sessions.values():
                session.close()
        if "footprint" in wanted and "int8" in sessions:
            self.footprint(model)

    def sessions(self, model: Model) -> Iterator[tuple[str, Session]]:
        """precision -> our session, for those that the backend has."""
        for precision in encoder_models.PRECISIONS:
            try:
                yield (
                    precision,
                    encoder_models.session(model, precision, self.backend, self.threads),
                )
            except KernelError as error:
                self.not_run.append(f"{model.name}: ours {precision}: {error}")

    def shapes(self, model: Model, sessions: dict[str, Session], names: Sequence[str]) -> None:
        arms, missing = ready.open_arms(
            model.name, model.folder, model.checkpoint.sha256, encoder_models.calibration(),
            self.threads, self.options.peers, lambda line: CONSOLE.print(f"bench: {line}"),
        )  # fmt: skip
        self.not_run += missing
        with Progress(console=CONSOLE, transient=True) as progress:
            for name in names:
                inputs = encoder_models.inputs(name)
                task = progress.add_task(f"{model.name} {name}", total=self.pace.rounds)
                self.shape(model, sessions, arms, inputs, lambda task=task: progress.advance(task))

    def shape(
        self,
        model: Model,
        sessions: dict[str, Session],
        arms: Sequence[padded.Arm],
        inputs: Inputs,
        step: Any,
    ) -> None:
        """All precisions of ours and all peers on the same texts."""
        ours = list(self.ours(sessions, inputs))
        theirs = list(self.theirs(arms, inputs))
        kept = pilot([*ours, *theirs])
        kept += pilot(list(self.fixed(arms, kept, inputs)))
        left_out = [one for one in theirs if one not in kept]
        agreements: dict[tuple[str, str], dict[str, float]] = {}
        for precision, session in sessions.items():
            encoder_models.check_executed(model, precision, session)
        reference = next((one for one in kept if one.column == "torch_fp32"), ours[-1]).hidden()
        for one in list(kept):
            figures = encoder_rows.agreement(reference, one.hidden())
            agreements[one.column, one.arm] = figures
            if not encoder_rows.agrees(one.column, figures):
                line = f"{model.name}/{inputs.name}: {one.column}: {one.arm}: cosine"
                self.not_run.append(f"{line} {figures['cosine']:.4f} to the reference")
                kept.remove(one)
        measure(kept, self.pace, sum(inputs.lengths), step)
        made = encoder_rows.encoder_rows(
            model, inputs, kept, left_out, agreements, self.found[self.threads]
        )
        self.rows += made
        for row in made:
            best = min(
                (v["median"] for k, v in row.items() if k.endswith("_int8_ms") and v), default=None
            )
            line = (
                f"{model.name} {inputs.name} {row['precision']}: {row['ours_ms']['median']:.2f} ms"
            )
            CONSOLE.print(line + (f", best int8 peer {best:.2f} ms" if best else ""))

    def ours(self, sessions: dict[str, Session], inputs: Inputs) -> Iterator[Contender]:
        batch = inputs.batch()
        for precision, session in sessions.items():

            def run(session: Session = session) -> Any:
                return session.run(batch, output="tokens")

            yield Contender(f"{encoder_rows.OURS} {precision}", self.backend.name, run, run)

    def theirs(self, arms: Sequence[padded.Arm], inputs: Inputs) -> Iterator[Contender]:
        """Every arm; over texts of different lengths every way of cutting them, too."""
        ways = padded.WAYS if inputs.mixed else padded.WAYS[:1]
        for arm, way in itertools.product(arms, ways):
            run, hidden = padded.bind(arm, inputs.ids, way)
            name = f"{arm.name}, {way}" if inputs.mixed else arm.name
            yield Contender(arm.column, name, run, hidden)

    def fixed(
        self, arms: Sequence[padded.Arm], kept: Sequence[Contender], inputs: Inputs
    ) -> Iterator[Contender]:
        """The best arm of each column compiled for exactly this shape, where a peer can do so."""
        if inputs.mixed:
            return
        best: dict[str, Contender] = {}
        for one in kept:
            if one.column not in best or one.pilot_ms < best[one.column].pilot_ms:
                best[one.column] = one
        shape = (len(inputs.ids), inputs.lengths[0])
        for arm in arms:
            if arm.fixed is not None and arm.name == best[arm.column].arm:
                still = arm.fixed(shape)
                run, hidden = padded.bind(still, inputs.ids, padded.WAYS[0])
                yield Contender(still.column, still.name, run, hidden)

    def footprint(self, model: Model) -> None:
        folder = encoder_models.encoder_folder(model, "int8", self.backend.name, self.threads)
        ids = encoder_models.inputs("1x16").ids[0].tolist()
        CONSOLE.print(f"bench: {model.name}: fresh processes")
        figures = footprint.measure(folder, self.threads, ids, 2 if self.options.quick else 7)
        self.rows.append(encoder_rows.footprint_row(model.name, "int8", figures))


def backend_name(backend: Backend) -> str:
    """The backend, with the dispatch level where it has one."""
    level = getattr(getattr(backend, "level", None), "name", "")
    return f"{backend.name} {level}".strip()


def chosen_rows(patterns: Sequence[str] | None) -> dict[str, list[str]]:
    """model -> rows; a pattern is model/row with * and ?."""
    chosen = {
        name: [
            row
            for row in rows
            if not patterns or any(fnmatch.fnmatch(f"{name}/{row}", one) for one in patterns)
        ]
        for name, rows in ROWS.items()
    }
    chosen = {name: rows for name, rows in chosen.items() if rows}
    if not chosen:
        known = ", ".join(f"{name}/{row}" for name, rows in ROWS.items() for row in rows)
        raise SystemExit(
            f"bench: no row is called {' or '.join(patterns or ())}; there are {known}"
        )
    return chosen


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", metavar="MODEL/ROW", help="patterns; default: all")
    parser.add_argument("--peers", nargs="*", default=list(ready.PEERS), choices=list(ready.PEERS))
    parser.add_argument(
        "--backend", nargs="+", default=["cpu", "onednn"], help="ours: the first that opens"
    )
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--rounds", type=int, default=Pace.rounds)
    parser.add_argument("--seconds", type=float, default=Pace.turn_s, help="timed in a turn")
    parser.add_argument("--results", type=Path, help="folder; default: results/ for a whole run")
    parser.add_argument("--quick", action="store_true", help="proves that it runs; no figures")
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
