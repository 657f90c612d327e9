"""SAMP for Triton: checkpoint and labelled data in, a served model repository out.

result = samp_core.build({"model": "my-checkpoint", "data": "held-out.jsonl"})
pipeline = samp_core.load("model_repository/my-checkpoint", "fast")
pipeline.predict(["a fine film"])["LABEL"]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from samp_core.build import build as build
    from samp_core.pipeline import load as load


def __getattr__(name: str) -> Any:
    """`build` and `load`, imported when first asked for: nothing heavy comes with the package."""
    if name == "build":
        import importlib

        return importlib.import_module("samp_core.build")  # a module that can be called
    if name == "load":
        from samp_core.pipeline import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
