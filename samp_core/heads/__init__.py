"""Task heads: one file each, from a checkpoint's weights and the encoder's output to answers.

A head file defines `HEAD = Head(...)`. A build copies it beside the served weights, where it is
loaded with `load_file`: it imports NumPy, the standard library, and of ours this module, `bio`,
`pooled` and `errors` only.
Every other file of this folder is a built-in head; `register` adds one from elsewhere.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from samp_core.errors import SampError

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]
Weights = Mapping[str, FloatArray]
HIDDEN = -2
"""In a TensorSpec's dims: the encoder's number of features."""


@dataclass(frozen=True)
class TensorSpec:
    """A served output: its dims without the batch may depend on the number of labels."""

    name: str
    datatype: Literal["BYTES", "FP32", "INT32", "BOOL"]
    dims: tuple[int, ...] | Callable[[int], tuple[int, ...]]

    def shape(self, labels: int, hidden: int = -1) -> tuple[int, ...]:
        """The dims for so many labels and encoder features; -1 is any length."""
        dims = self.dims(labels) if callable(self.dims) else self.dims
        return tuple(hidden if dim == HIDDEN else dim for dim in dims)


@dataclass(frozen=True)
class TokenRow:
    """One text as a token head sees it: logits [L, C], and each token's offsets [L, 2] and word
    [L], both -1 for special tokens.
    """

    logits: FloatArray
    offsets: IntArray
    words: IntArray


def softmax_divergence(reference: FloatArray, logits: FloatArray) -> float:
    """Mean KL(softmax(reference) || softmax(logits)) over rows, in nats."""

    def log_softmax(x: FloatArray) -> NDArray[np.float64]:
        wide = x.astype(np.float64)
        wide = wide - wide.max(axis=1, keepdims=True)
        return np.asarray(wide - np.log(np.exp(wide).sum(axis=1, keepdims=True)))

    p, q = log_softmax(reference), log_softmax(logits)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


@dataclass(frozen=True)
class Head:
    """One task's head.

    export(state_dict, config): the head's own weights, float32, from the checkpoint's; SampError
        if the checkpoint lacks them.
    logits(weights, feature): raw scores [b, C] float32 from the encoder's output, what the
        builder compares.
    run(weights, feature, labels): one array per output, [b, *dims]; BYTES as objects. A row's
        result must not depend on the other rows.
    rows(texts, labels): for encoder_output "tokens", in place of `run`: each text's outputs, whose
        first dim may differ from text to text where the spec says -1. A head has one of the two.
    encoder_tensors(state_dict, config): tensors that the encoder needs for this head; the linear
        layer of a token head runs there, so that logits cross to the head and not states.
    divergence(reference, logits): how far a plan's raw scores are from float's, 0 when equal.
    """

    name: str
    encoder_output: Literal["first", "mean", "tokens"]
    outputs: tuple[TensorSpec, ...]
    export: Callable[[Mapping[str, NDArray[Any]], Mapping[str, Any]], dict[str, FloatArray]]
    logits: Callable[[Weights, FloatArray], FloatArray]
    run: Callable[[Weights, FloatArray, Sequence[str]], dict[str, NDArray[Any]]] | None = None
    rows: Callable[[Sequence[TokenRow], Sequence[str]], list[dict[str, NDArray[Any]]]] | None = None
    encoder_tensors: (
        Callable[[Mapping[str, NDArray[Any]], Mapping[str, Any]], dict[str, FloatArray]] | None
    ) = None
    divergence: Callable[[FloatArray, FloatArray], float] = field(default=softmax_divergence)


def padded(head: Head, rows: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Texts' outputs as [b, ...], shorter ones filled up: b"", 0, and -1 for places.

    At least one place wide: an output without elements is none for many clients.
    """
    result: dict[str, NDArray[Any]] = {}
    for spec in head.outputs:
        parts = [row[spec.name] for row in rows]
        width = max(1, *(len(part) for part in parts))
        fill: Any = {"BYTES": b"", "FP32": 0.0, "INT32": -1, "BOOL": False}[spec.datatype]
        whole = np.full((len(parts), width, *parts[0].shape[1:]), fill, dtype=parts[0].dtype)
        for row, part in zip(whole, parts, strict=True):
            row[: len(part)] = part
        result[spec.name] = whole
    return result


_registered: dict[str, tuple[Head, Path]] = {}


def register(source: str | Path | ModuleType) -> Head:
    """Add the head of a file or an imported module. A name belongs to one file."""
    if isinstance(source, ModuleType):
        path = Path(str(source.__file__)).resolve()
        head = _head_of(source, path)
    else:
        path = Path(source).resolve()
        head = load_file(path)
    _load_built_in()
    _add(head, path)
    return head


def get(name: str) -> Head:
    """The head of that name."""
    return _find(name)[0]


def names() -> list[str]:
    """All known heads, sorted."""
    _load_built_in()
    return sorted(_registered)


def source_file(name: str) -> Path:
    """The file that defines the head, for copying into a build."""
    return _find(name)[1]


def load_file(path: str | Path) -> Head:
    """The HEAD of a Python file, executed anew, without registering it."""
    path = Path(path).resolve()
    if not path.is_file():
        raise _invalid(path, "no such file")
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    name = f"samp_head_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise _invalid(path, "not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _invalid(path, f"{type(error).__name__}: {error}") from error
    return _head_of(module, path)


def _find(name: str) -> tuple[Head, Path]:
    _load_built_in()
    if name not in _registered:
        raise SampError(
            "head_unknown",
            f"head {name!r}",
            ", ".join(sorted(_registered)),
            "choose one of these, or register the file that defines it",
        )
    return _registered[name]


def _load_built_in() -> None:
    known = {path for _, path in _registered.values()}
    for path in sorted(Path(__file__).resolve().parent.glob("*.py")):
        if path.name != "__init__.py" and path not in known:
            _add(load_file(path), path)


def _add(head: Head, path: Path) -> None:
    known = _registered.get(head.name)
    if known is not None and known[1] != path:
        raise _invalid(path, f"the head {head.name!r} is already defined by {known[1]}")
    _registered[head.name] = (head, path)


def _head_of(module: ModuleType, path: Path) -> Head:
    head = getattr(module, "HEAD", None)
    if not isinstance(head, Head):
        raise _invalid(path, f"HEAD is {type(head).__name__}")
    if (head.run is None) == (head.rows is None):
        which = "neither" if head.run is None else "both"
        raise _invalid(path, f"HEAD has {which} of run and rows")
    return head


def _invalid(path: Path, why: str) -> SampError:
    return SampError(
        "head_invalid", f"{path}: {why}", "a Python file that defines HEAD = Head(...)", "mend it"
    )
