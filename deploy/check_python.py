"""Say in one line why this Python cannot hold the environment; nothing and exit 0 when it can.

    python3.11 deploy/check_python.py

Standard library alone, for any Python 3.6 or later: it must be able to speak to a wrong one.
"""

import ctypes.util
import importlib.util
import os
import sys
import sysconfig

# numpy 1.26, which the embedded Triton's stub wants, has wheels up to Python 3.12.
ALLOWED = ((3, 11), (3, 12))


def complaint() -> str:
    """What is wrong with this interpreter and what mends it; "" when nothing is."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if sys.version_info[:2] not in ALLOWED:
        return (
            f"{sys.executable} is Python {version}; allowed: 3.11 or 3.12; "
            "name one: make PYTHON=/path/to/python3.11"
        )
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            return (
                f"Python {version} has no module {module}; "
                f"install it: apt-get install python{version}-venv"
            )
    library = f"libpython{version}.so.1.0"
    libdir = sysconfig.get_config_var("LIBDIR") or ""
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    folders = [libdir, os.path.join(libdir, multiarch), os.path.join(sys.base_prefix, "lib")]
    there = any(os.path.exists(os.path.join(folder, library)) for folder in folders)
    if there or ctypes.util.find_library(f"python{version}"):
        return ""
    return (
        f"{library} is not on this machine, and Triton's Python stub links it; install it: "
        f"apt-get install libpython{version}, or use a Python built with --enable-shared"
    )


if __name__ == "__main__":
    sys.exit(complaint() or 0)
