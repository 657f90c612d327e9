"""`samp`, also as `python -m samp_core`; where only the client is installed, what is missing."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    try:
        from samp_core.cli import main as run
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.startswith("samp_"):
            raise
        print(
            f"samp: not_installed: {missing.name} is not there, as only the client was installed; "
            "pip install 'samp-triton[build]'",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    run()


if __name__ == "__main__":
    main()
