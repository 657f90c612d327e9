"""The backends by name. A backend's module is imported only when it is opened."""

from __future__ import annotations

from samp_kernels.interface import Backend

from samp_core.errors import SampError

BACKENDS = ("cpu", "cuda", "onednn", "reference")


def open_backend(name: str, threads: int | None = None) -> Backend:
    """A backend by name. `onednn` brings torch."""
    if name == "cpu":
        from samp_kernels.cpu import MEND, missing

        why = missing()
        if why:
            raise SampError("no_native_kernels", f"backend cpu: {why}", "onednn, reference", MEND)
        from samp_kernels.cpu.backend import CpuBackend

        return CpuBackend(threads)
    if name == "cuda":
        from samp_kernels.cuda import MEND as CUDA_MEND
        from samp_kernels.cuda import missing as missing_cuda

        why = missing_cuda()
        if why:
            raise SampError("no_cuda", f"backend cuda: {why}", "cpu, onednn, reference", CUDA_MEND)
        from samp_kernels.cuda.backend import CudaBackend

        return CudaBackend()
    if name == "onednn":
        from samp_kernels.onednn import OneDnnBackend

        return OneDnnBackend(threads)
    if name == "reference":
        from samp_kernels.reference import ReferenceBackend

        return ReferenceBackend()
    raise SampError("unknown_backend", f"backend {name!r}", ", ".join(BACKENDS), "choose one")


def choose_backend(name: str, head_dim: int | None = None) -> str:
    """`auto` as a backend's name, any other name as it is.

    `cuda` where a GPU is there and `make gpu-check` passed on its architecture with these kernels,
    for a model whose heads they have; else the CPU's.
    """
    if name != "auto":
        return name
    from samp_kernels.cuda import not_automatic

    return cpu_backend() if not_automatic(head_dim) else "cuda"


def cpu_backend() -> str:
    """`cpu` where its kernels were built and run vector instructions, else `onednn`."""
    from samp_kernels.cpu import level

    return "cpu" if level() not in ("", "portable") else "onednn"


def unused_gpu(head_dim: int | None = None) -> str:
    """Why `auto` leaves a GPU unused that backend cuda could run on; "" where there is none."""
    from samp_kernels.cuda import emulated, missing, not_automatic

    able = not emulated() and (not missing() or "no cubin" in missing())
    return (missing() or not_automatic(head_dim)) if able else ""
