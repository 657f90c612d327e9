"""Where the browser's tests leave their screenshots."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def pictures() -> Path:
    """build/report/: git-ignored, written over by every run."""
    return ROOT / "build" / "report"
