"""Which arm of an A/B comparison a key always gets."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from fractions import Fraction

BUCKETS = 10_000


def bucket(key: str | bytes) -> int:
    """The first 8 bytes of SHA-256(key), big-endian, modulo 10,000; str keys as UTF-8."""
    raw = key.encode() if isinstance(key, str) else key
    return int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") % BUCKETS


def sticky_arm(key: str | bytes, weights: Mapping[str, float]) -> str:
    """The arm of `key`: its bucket against the cumulative weights, in the mapping's order.

    Weights are shares on any scale (90 and 10, or 0.9 and 0.1). ValueError if they are empty,
    negative, not finite, or all zero.
    """
    shares: list[tuple[str, Fraction]] = []
    for arm, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"arm {arm!r}: expected a finite weight >= 0, got {weight}")
        # By its decimal digits: 0.1 + 0.2 must end where 0.3 does.
        shares.append((arm, Fraction(str(weight))))
    total = sum((share for _, share in shares), Fraction(0))
    if total == 0:
        raise ValueError(f"expected at least one weight above 0, got {dict(weights)}")
    place = bucket(key) * total
    reached = Fraction(0)
    for arm, share in shares:
        reached += share
        if place < reached * BUCKETS:
            return arm
    raise AssertionError("a bucket is below 10,000")
