"""One kernel interface, several backends; the session runs a whole encoder under one plan."""

import os

# libgomp reads this once, when torch is first imported, so it is set before any backend is. Threads
# that sleep at every barrier (a passive wait policy) make a pass of few tokens three times as long;
# threads that spin for good take the core from the tokenizer beside them. A fraction of a
# millisecond bridges the gap between two GEMMs.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
