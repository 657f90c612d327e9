"""Measures plans of one checkpoint on one device: logits, correctness, latency; all cached."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
from samp_kernels.cpu import level
from samp_kernels.interface import CODES, F32, Array, Backend, Session

from samp_core import bio, calibrate, encoder, heads, latency
from samp_core.backends import open_backend
from samp_core.cache import Cache
from samp_core.checkpoint import Checkpoint
from samp_core.data import Rows, gold_values
from samp_core.device import device
from samp_core.encoder import (
    LoopSession,
    check_plan,
    halves,
    prepare,
    quantizable_sites,
)
from samp_core.errors import SampError, UsageError
from samp_core.pipeline import batches, pieces, run_logits, run_tokens
from samp_core.plan import Plan, Recipe, mode_plan
from samp_core.quantize import Memo, export_weights
from samp_core.rows import Text
from samp_core.tasks import TASKS, Task
from samp_core.text import Encoding, TextEncoder

ON_REQUEST = ("bf16", "fp8")
"""Precisions that a search tries only where they are asked for."""


class Progress(Protocol):
    """Where long work is shown: one call a stage, which returns what to call at each step."""

    def __call__(self, title: str, steps: int) -> Callable[[], None]: ...


def silent(title: str, steps: int) -> Callable[[], None]:
    return lambda: None


@dataclass
class Split:
    """One split's rows, their tokens, and gold as data.gold_values gives it.

    The two texts of a pair are one encoding; of a row of embeddings they are two, all first texts
    before all second ones. Embeddings without scores have float's own vectors for gold.
    """

    rows: Rows
    encodings: list[Encoding]
    gold: Any


@dataclass
class Workbench:
    """What `build` measures with. Sessions share packed weights and are made when first needed."""

    checkpoint: Checkpoint
    text: TextEncoder
    head: heads.Head
    head_weights: Mapping[str, Array]
    cache: Cache
    code: str
    backend_name: str
    threads: int
    progress: Progress = silent
    task: Task = TASKS["classification"]
    precisions: tuple[str, ...] = ()
    """Those that plans may choose beside fp32; empty: all that the backend has."""
    sample: tuple[latency.Bucket, ...] = ()
    """Shapes of the build's own mix, measured beside those of the search split."""
    _backend: Backend | None = None
    _sessions: dict[str, Session] = field(default_factory=dict)
    _packs: dict[tuple[str, str, str], Any] = field(default_factory=dict)
    quantized: Memo = field(default_factory=dict)

    @property
    def backend(self) -> Backend:
        if self._backend is None:
            self._backend = open_backend(self.backend_name, self.threads)
        return self._backend

    def split(self, rows: Rows) -> Split:
        gold = gold_values(rows, self.task.gold, self.checkpoint.labels)
        texts: list[Text] = list(rows.texts)
        if self.task.gold_optional and gold is not None:
            texts = [pair[place] for place in (0, 1) for pair in rows.texts]
        encodings = self.text.encode(texts, offsets=self.head.rows is not None)
        split = Split(rows, encodings, gold)
        if gold is None:  # a plan is judged by how near it stays to float
            split.gold = self.logits(self.base_plan(), split, "float")
        return split

    def pieces(self, split: Split) -> list[Encoding]:
        """What the encoder runs for a split: its texts, long ones as their windows."""
        return pieces(split.encodings, self.text.windows)

    def shapes(self, split: Split) -> list[latency.Bucket]:
        """What latencies are measured on: 1, 8 and 32 texts of a split, and the mix's sample."""
        offset = self.checkpoint.config.position_offset
        return [*latency.buckets(self.pieces(split), offset), *self.sample]

    def divergence(self, reference: F32, logits: F32) -> float:
        """How far a plan's logits are from float's, by the head's own measure."""
        return self.head.divergence(reference, logits)

    def base_plan(self) -> Plan:
        """The float plan, with no provenance yet."""
        empty = Plan(
            model_sha256=self.checkpoint.sha256,
            config=self.checkpoint.plan_config(),
            backend=self.backend_name,
            device=self.device(),
            sites={},
        )
        return mode_plan(empty, "float", 0, (), Recipe())

    def quantizable(self, precision: str = "int8") -> tuple[str, ...]:
        """The kinds of sites that plans may have in int8, or in fp8."""
        return quantizable_sites(self.backend, precision) if self.allows(precision) else ()

    def narrow(self) -> tuple[str, ...]:
        """The quantized precisions that plans may choose. The first is the one that SAMP's modes
        and the order of layers are made of."""
        return tuple(p for p in CODES if self.quantizable(p))

    def halves(self) -> tuple[str, ...]:
        """The floats beside fp32 that plans may choose."""
        return tuple(p for p in halves(self.backend) if self.allows(p))

    def allows(self, precision: str) -> bool:
        """Whether it is asked for, or nothing is and it is none of those that must be."""
        if self.precisions:
            return precision in self.precisions
        return precision not in ON_REQUEST

    def check_precisions(self) -> None:
        """Raises UsageError for a precision that was asked for and is not there."""
        able = ["fp32", *halves(self.backend)]
        able += [p for p in CODES if quantizable_sites(self.backend, p)]
        for precision in self.precisions:
            if precision not in able:
                raise UsageError(
                    "unsupported_precision",
                    f"precision {precision} on backend {self.backend_name}",
                    ", ".join(able),
                    "leave it out of precisions, or name another backend",
                )

    def session(self, plan: Plan) -> Session:
        key = plan.key()
        if key not in self._sessions:
            tensors = export_weights(self.checkpoint.tensors, plan, self.quantized)
            config = self.checkpoint.config
            self._sessions[key] = prepare(
                self.backend, config, tensors, plan, threads=self.threads, packs=self._packs
            )
        return self._sessions[key]

    def loop_session(self, plan: Plan) -> LoopSession:
        """A session over the backend's ops, which every backend has; it is not kept."""
        check_plan(self.backend, self.checkpoint.config, plan)
        tensors = export_weights(self.checkpoint.tensors, plan, self.quantized)
        return LoopSession(self.backend, self.checkpoint.config, tensors, plan, self._packs)

    def ranges(self, split: Split) -> dict[str, Array]:
        """Activation ranges over a split, from the float plan."""
        plan = self.base_plan()

        def make() -> dict[str, Array]:
            session = self.loop_session(plan)
            packed = [batch for batch, _ in batches(self.pieces(split))]
            step = self.progress("calibrate: activation ranges", 2 * len(packed))
            output = self.head.encoder_output
            return calibrate.observe(session, packed, output, self.backend.to_host, step, self.each)

        return self.cache.arrays("ranges", self.key(plan, split), make)

    def logits(self, plan: Plan, split: Split, title: str) -> F32:
        """[rows, C] of a plan over a split; [words, C] of a token head, as Pipeline.logits."""

        def make() -> dict[str, Array]:
            packed = batches(self.pieces(split))
            step = self.progress(title, len(packed))
            session = self.session(plan)
            if self.head.rows is None:
                made = run_logits(session, self.head, self.head_weights, packed, step)
            else:
                tokens = run_tokens(session, split.encodings, self.text.windows, step)
                firsts = (bio.first_tokens(np.asarray(e.words)) for e in split.encodings)
                made = np.concatenate([t[f] for t, f in zip(tokens, firsts, strict=True)])
            self._check_executed(session, plan)
            if not np.isfinite(made).all():
                if plan.key() == self.base_plan().key():  # this one names the site
                    some = [batch for batch, _ in packed]
                    session, output = self.loop_session(plan), self.head.encoder_output
                    calibrate.observe(session, some, output, self.backend.to_host, each=self.each)
                raise SampError(
                    "not_finite", f"{title}: the logits hold NaN or infinity", "finite logits",
                    "check the checkpoint",
                )  # fmt: skip
            return {"logits": made}

        return self.cache.arrays("logits", self.key(plan, split), make)["logits"]

    def latencies(
        self,
        plans: Mapping[str, Plan],
        split: Split,
        title: str,
        buckets: Sequence[str] | None = None,
        known: Mapping[str, dict[str, float]] | None = None,
    ) -> dict[str, dict[str, float]]:
        """name -> bucket -> median ms of encoder and head, all plans interleaved.

        Of all buckets, or of those named. known: what a measurement of these plans among others
        gave, which is then kept for them.
        """

        def make() -> dict[str, dict[str, float]]:
            if known is not None:
                return {name: known[name] for name in plans}
            shapes = self.shapes(split)
            shapes = [shape for shape in shapes if buckets is None or shape.name in buckets]
            step = self.progress(title, sum(bucket.rounds for bucket in shapes))
            calls = {name: self._call(self.session(plan)) for name, plan in plans.items()}
            result: dict[str, dict[str, float]] = {name: {} for name in plans}
            for bucket in shapes:
                for name, ms in latency.measure(calls, bucket, progress=step).items():
                    result[name][bucket.name] = ms
            return result

        key = {
            "plans": {name: plan.key() for name, plan in plans.items()},
            "device": self.device(),
            "title": title,
            "buckets": buckets and sorted(buckets),
            **self.sampled(),
        }
        made: dict[str, dict[str, float]] = self.cache.json(
            "latency", {**key, **self.key(self.base_plan(), split)}, make
        )
        return made

    def device(self) -> dict[str, Any]:
        """What latencies are measured on: the backend's GPU, else this CPU."""
        own: dict[str, Any] = getattr(self.backend, "device_facts", dict)()
        return {**own, "threads": self.threads} if own else device(self.threads)

    def sampled(self) -> dict[str, Any]:
        """What measured shapes depend on beside the split: the lengths of the mix's sample."""
        if not self.sample:
            return {}
        return {"sample": {b.name: np.diff(b.batch.cu_seqlens).tolist() for b in self.sample}}

    def each(self, do: Callable[[Any], Any], some: Sequence[Any]) -> Iterator[Any]:
        """`do` of each, in their order. One op of the native backend runs on one thread, so that
        batches side by side fill the cores; the other backends' ops do by themselves.
        """
        if self.backend_name != "cpu":
            yield from map(do, some)
            return
        with ThreadPoolExecutor(self.threads) as pool:
            yield from pool.map(do, some)

    def close(self) -> None:
        self._sessions.clear()
        self._packs.clear()

    def _call(self, session: Session) -> latency.Call:
        def call(batch: Any) -> object:
            feature = session.run(batch, output=self.head.encoder_output)
            return self.head.logits(self.head_weights, feature)

        return call

    def _check_executed(self, session: Session, plan: Plan) -> None:
        executed = session.executed()
        wrong = {s: p for s, p in executed.items() if p != plan.precision(s)}
        if wrong:
            site, ran = next(iter(wrong.items()))
            raise SampError(
                "wrong_kernel", f"{site} ran in {ran}", plan.precision(site), "report this"
            )

    def key(self, plan: Plan, split: Split) -> dict[str, Any]:
        """What a measurement of this plan over this split depends on."""
        return {
            "plan": plan.key(),
            "split": split.rows.sha256,
            "max_length": self.text.max_length,
            "windows": None if self.text.windows is None else asdict(self.text.windows),
            "spaces": self.text.spaces,
            "code": self.code,
            "versions": versions(),
        }


def versions() -> dict[str, str]:
    """The versions that can change a result."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("samp-triton", "torch", "numpy", "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    found["cpu kernels"] = level() or "absent"
    return found


def forwards() -> int:
    """Encoder passes of this process so far."""
    return encoder.FORWARDS
