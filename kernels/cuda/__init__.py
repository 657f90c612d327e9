"""The CUDA backend: kernels in src/, compiled to cubins by build.py, launched through CuPy.

units.py says what is compiled, tiles.py which tile runs, launcher.py what launches it, ops.py one
op as one launch, session.py a whole encoder as one graph.
"""

from __future__ import annotations
