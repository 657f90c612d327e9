"""Which failed requests may be sent again, and when."""

from __future__ import annotations

import random
from dataclasses import dataclass

from samp_client.errors import BadRequest


@dataclass(frozen=True)
class Retry:
    """Sends again what the server has certainly not begun: no connection, or its own refusal.

    Never after a deadline, a wrong request, or a connection that broke under way: there the server
    may have done the work already. attempts: sends of one request in all; the pause before the
    n-th doubles from first_s up to most_s, a random half of it taken off, so that callers that
    failed together do not come back together; it never reaches beyond the call's deadline.
    """

    attempts: int = 4
    first_s: float = 0.05
    most_s: float = 2.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or not 0 < self.first_s <= self.most_s:
            raise BadRequest(
                f"{self}", "attempts of 1 or more, 0 < first_s <= most_s", "correct it"
            )

    def pause(self, sent: int, left_s: float) -> float | None:
        """Seconds to wait after `sent` attempts with `left_s` to go; None: give up."""
        if sent >= self.attempts:
            return None
        longest = min(self.most_s, self.first_s * 2.0 ** min(sent - 1, 60))
        pause = longest * random.uniform(0.5, 1.0)
        return pause if pause < left_s else None


ONCE = Retry(attempts=1)
