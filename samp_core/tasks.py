"""The tasks that can be built: what a row of each holds, and the head that answers it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from samp_core.errors import UsageError

TaskName = Literal[
    "classification", "pairs", "entities", "multi-label", "regression", "reranking", "embedding"
]
Gold = Literal["label", "labels", "score", "entities"]
"""What a row is labelled with: one class, a set of classes, a number, or spans of the text."""


@dataclass(frozen=True)
class Task:
    """pair: a row is two texts; gold_optional: rows without gold can be built on too."""

    name: TaskName
    head: str
    gold: Gold
    pair: bool = False
    gold_optional: bool = False


_ALL = (
    Task("classification", "classification", "label"),
    Task("pairs", "classification", "label", pair=True),
    Task("entities", "entities", "entities"),
    Task("multi-label", "multi-label", "labels"),
    Task("regression", "regression", "score"),
    Task("reranking", "regression", "score", pair=True),
    Task("embedding", "embedding", "score", gold_optional=True),
)
TASKS: Mapping[str, Task] = {str(task.name): task for task in _ALL}


def get(name: str) -> Task:
    """The task of that name."""
    if name not in TASKS:
        raise UsageError("bad_task", f"task {name!r}", ", ".join(TASKS), "name one of these")
    return TASKS[name]
