"""The one error a user sees: what came, what is allowed, what to do."""

from __future__ import annotations


class SampError(Exception):
    """The work failed for a reason that the user can mend. Exit code 1."""

    exit_code = 1

    def __init__(self, code: str, given: str, allowed: str, fix: str) -> None:
        super().__init__(code, given, allowed, fix)
        self.code = code
        self.given = given
        self.allowed = allowed
        self.fix = fix

    def __str__(self) -> str:
        parts = [self.given]
        if self.allowed:
            parts.append(f"allowed: {self.allowed}")
        if self.fix:
            parts.append(self.fix)
        return f"{self.code}: " + "; ".join(parts)

    def to_json(self) -> dict[str, dict[str, str]]:
        """The object printed under `--json`."""
        return {
            "error": {
                "code": self.code,
                "given": self.given,
                "allowed": self.allowed,
                "fix": self.fix,
            }
        }


class UsageError(SampError):
    """The command line or the build file is wrong. Exit code 2."""

    exit_code = 2
