"""Whether the verification rows can support a promise at all: said before anything is searched.

A bound has a floor: even a plan that changes no answer could have lost some among rows that were
not seen. Where that floor lies above a promise, no plan that loses nothing and gains nothing can
pass, and the build says so at once, with the rows that it would take.
"""

from __future__ import annotations

from collections.abc import Mapping

from samp_core.config import TierSpec
from samp_core.tiers import Verifier


def shortage(tier: str, spec: TierSpec, verifier: Verifier) -> str | None:
    """In words, what the rows lack for a tier's promise; None where they are enough.

    Runs float over the rows only where the metric's floor depends on its answers.
    """
    if spec.drop is None:
        return None
    test, needed = verifier.unchanged(spec.drop / 100.0)
    if test.passed:
        return None
    return (
        f"tier {tier}: a promise of {spec.drop:g} points needs at least {needed} verification "
        f"rows even for a plan that changes nothing; there are {verifier.n:,}, enough for "
        f"{_up(100.0 * test.bound)} points: give more rows, or let the tier lose more"
    )


def shortages(tiers: Mapping[str, TierSpec], verifier: Verifier) -> list[str]:
    """That of every tier that has one."""
    found = (shortage(name, spec, verifier) for name, spec in tiers.items())
    return [text for text in found if text is not None]


def _up(points: float) -> str:
    """Two digits behind the point, rounded up: a promise of so much passes."""
    return f"{-(-points * 100 // 1) / 100:.2f}"
