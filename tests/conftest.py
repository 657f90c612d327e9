"""Helpers of several test folders lie beside this file: pytest puts its folder on the path."""

from __future__ import annotations

import os
import signal

# A shell starts what it runs in the background with SIGINT ignored, and processes inherit that:
# tests that interrupt one would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# `auto` is the CPU's backend in tests, also where a GPU has been proven (test_cuda_auto.py).
os.environ["SAMP_PROVEN"] = os.devnull
