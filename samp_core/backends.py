"""The backends by name. A backend's module is imported only when it is opened."""

from __future__ import annotations

from samp_kernels import cuda
from samp_kernels.interface import Backend

from samp_core import gpu_proof
from samp_core.errors import SampError

BACKENDS = ("cpu", "cuda", "onednn", "reference")


def open_backend(name: str, threads: int | None = None, gpu: int = 0) -> Backend:
    """A backend by name. `onednn` brings torch; gpu: which one `cuda` runs on."""
    if name == "cpu":
        from samp_kernels.cpu import MEND, missing

        why = missing()
        if why:
            raise SampError("no_native_kernels", f"backend cpu: {why}", "onednn, reference", MEND)
        from samp_kernels.cpu.backend import CpuBackend

        return CpuBackend(threads)
    if name == "cuda":
        why = cuda.missing()
        if why:
            raise SampError("no_cuda", f"backend cuda: {why}", "cpu, onednn, reference", cuda.MEND)
        from samp_kernels.cuda.backend import CudaBackend

        return CudaBackend(gpu=gpu)
    if name == "onednn":
        from samp_kernels.onednn import OneDnnBackend

        return OneDnnBackend(threads)
    if name == "reference":
        from samp_kernels.reference import ReferenceBackend

        return ReferenceBackend()
    raise SampError("unknown_backend", f"backend {name!r}", ", ".join(BACKENDS), "choose one")


def choose_backend(
    name: str, head_dim: int | None = None, progress: gpu_proof.Progress = gpu_proof.silent
) -> str:
    """`auto` as a backend's name, any other name as it is.

    `cuda` where a GPU is there, its cubins are, and a check of these kernels has passed on it, for
    a model whose heads they have; else the CPU's. The check is made here where it never was.
    """
    if name != "auto":
        return name
    return cpu_backend() if gpu_proof.why_not(head_dim, progress) else "cuda"


def cpu_backend() -> str:
    """`cpu` where its kernels were built and run vector instructions, else `onednn`."""
    from samp_kernels.cpu import level

    return "cpu" if level() not in ("", "portable") else "onednn"


def unused_gpu(head_dim: int | None = None) -> str:
    """Why `auto` leaves a GPU unused that backend cuda could run on; "" where there is none."""
    able = not cuda.for_tests() and (not cuda.missing() or "no cubin" in cuda.missing())
    return cuda.not_automatic(head_dim) if able else ""


def doubts(progress: gpu_proof.Progress = gpu_proof.silent) -> str:
    """What speaks against backend cuda where it was asked for by name: a check of these kernels
    that failed on this GPU. It is made here where it never was."""
    return "" if cuda.unfit() else gpu_proof.why_not(None, progress)
