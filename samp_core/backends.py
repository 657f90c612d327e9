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


def choose_backend(name: str) -> str:
    """`auto` as a backend's name: `cpu` where its kernels were built and run vector instructions,
    else `onednn`; any other name as it is. Never `cuda`: its kernels have not met a GPU yet."""
    if name != "auto":
        return name
    from samp_kernels.cpu import level

    return "cpu" if level() not in ("", "portable") else "onednn"
