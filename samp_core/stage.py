"""The model repository that one server of ours is pointed at: a view of builds, its own alone.

A model here is config.pbtxt and a folder `1` of links into its build and a file that is new each
time. Triton (24.10) reloads a model only when a file of its version became newer or its
configuration differs: a build that one goes back to is older, and touching its config.pbtxt does
nothing. And nothing is written into a build.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from samp_core.activation import NEXT, Spec
from samp_core.model_config import drop_queue_policy, set_queue_s

BUILD = "build"
CONFIG = "config.pbtxt"
STAMP = "staged"


@dataclass(frozen=True)
class Layout:
    """What a server sets other than its builds, by role: tokenizer, encoder, head.

    queue_s: the bound of the tiers' queues.
    """

    instances: Mapping[str, int] = field(default_factory=dict)
    queue_delay_us: Mapping[str, int] = field(default_factory=dict)
    queue_s: float | None = None


@dataclass(frozen=True)
class Stage:
    """`folder` is the --model-repository."""

    folder: Path
    layout: Layout = field(default_factory=Layout)

    def put(self, name: str, spec: Spec) -> None:
        """Write model `name` so that the next load takes it, also when nothing in it differs.

        Its configuration gets the parameter `build`, and an ensemble its steps' aliases.
        """
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2 as pb

        model = self.folder / name
        text = (spec.source / CONFIG).read_text(encoding="utf-8")
        message = text_format.Parse(text, pb.ModelConfig())
        message.name = name
        message.parameters[BUILD].string_value = spec.build
        role = name.removeprefix(NEXT).partition("_")[0]
        if message.backend == "python":
            drop_queue_policy(message)  # of a build made by a release that wrote one
            if role in self.layout.instances:
                message.instance_group[0].count = self.layout.instances[role]
            if role in self.layout.queue_delay_us:
                delay = self.layout.queue_delay_us[role]
                message.dynamic_batching.max_queue_delay_microseconds = delay
            if self.layout.queue_s is not None:
                set_queue_s(message, self.layout.queue_s)
        aliases = dict(spec.aliases)
        for step in message.ensemble_scheduling.step:
            step.model_name = aliases.get(step.model_name, step.model_name)
        version = model / "1"
        before = max((path.stat().st_mtime_ns for path in model.rglob("*")), default=0)
        shutil.rmtree(version, ignore_errors=True)
        version.mkdir(parents=True)
        for path in sorted((spec.source / "1").iterdir()):
            if path.is_file():
                (version / path.name).symlink_to(path.resolve())
        (version / STAMP).write_text(spec.build, encoding="utf-8")
        written = model / f"{CONFIG}.{os.getpid()}"
        written.write_text(text_format.MessageToString(message), encoding="utf-8")
        written.replace(model / CONFIG)
        # Newer than what Triton has loaded, also when the clock was set back since.
        newer = max(time.time_ns(), 1_000_000_000 + before)
        for path in (model / CONFIG, version):
            os.utime(path, ns=(newer, newer))

    def builds(self, names: Iterable[str]) -> set[Path]:
        """The builds whose files these models use."""
        files = [p for name in names for p in (self.folder / name / "1").glob("*")]
        # <build>/models/<model>/1/<file>
        return {path.resolve().parents[3] for path in files if path.is_symlink()}

    def drop(self, name: str) -> None:
        shutil.rmtree(self.folder / name, ignore_errors=True)
