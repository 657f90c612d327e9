"""Numbers cross to and from Triton by DLPack where NumPy is 2."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from samp_core import serving


class Tensor:
    """As the stub of Triton 24.10 under NumPy 2: whole by DLPack alone."""

    def __init__(self, name: str, rows: Any) -> None:
        self.name, self.rows = name, np.empty(0, np.float32)

    @classmethod
    def from_dlpack(cls, name: str, rows: Any) -> Tensor:
        made = cls(name, rows)
        made.rows = np.array(np.from_dlpack(rows))
        return made

    def as_numpy(self) -> Any:
        return self.rows if self.name == "TEXT" else np.full_like(self.rows, 99)

    def __dlpack__(self, **options: Any) -> Any:
        return self.rows.__dlpack__()

    def __dlpack_device__(self) -> Any:
        return self.rows.__dlpack_device__()


def test_numbers_cross_by_dlpack_and_texts_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "BY_DLPACK", True)
    ids = np.arange(6, dtype=np.int32).reshape(2, 3)
    given = Tensor.from_dlpack("IDS", ids)
    assert np.array_equal(serving._array("IDS", given), ids)
    text = Tensor("TEXT", None)
    text.rows = np.array([[b"a"]], dtype=object)
    assert serving._array("TEXT", text)[0, 0] == b"a"
    feature = np.ones((2, 4), np.float32)
    made = serving._tensor(type("Backend", (), {"Tensor": Tensor}), "FEATURE", feature)
    assert np.array_equal(made.rows, feature)
