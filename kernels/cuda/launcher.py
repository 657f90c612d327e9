"""What starts a kernel: memory, copies and launches, on a GPU through CuPy or on a CPU.

The rest of the backend knows this protocol only, so that the emulator (emulator.py) runs the very
same launches without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from samp_kernels.cuda import load_cupy
from samp_kernels.cuda.build import find_cubin
from samp_kernels.cuda.units import ARCHITECTURES, Unit, for_device, units_by_name
from samp_kernels.interface import Array, KernelError

Scalar = np.generic
"""One argument: np.uint64 for an address, np.int32, np.float32."""


@dataclass(frozen=True)
class Launch:
    """One kernel call. `site`, `op` and `ran` say what it is part of and at which precision."""

    unit: str
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    arguments: tuple[Scalar, ...]
    op: str = ""
    site: str = ""
    ran: tuple[str, ...] = ()


@dataclass(frozen=True)
class Buffer:
    """Device memory: its address and size; `owner` keeps it alive."""

    pointer: int
    size: int
    owner: Any


class Launcher(Protocol):
    """`replay` runs what `capture` gave; a launcher without graphs launches one after another."""

    architecture: str
    multiprocessors: int

    def allocate(self, size: int) -> Buffer: ...

    def to_device(self, buffer: Buffer, data: Array, offset: int = 0) -> None: ...

    def to_host(self, buffer: Buffer, data: Array, offset: int = 0) -> None:
        """Fills `data`; waits for all that was launched before."""
        ...

    def fill(self, buffer: Buffer, offset: int, size: int) -> None:
        """Zeros."""
        ...

    def pinned(self, size: int) -> Array:
        """uint8 host memory that copies to and from the device fastest."""
        ...

    def launch(self, one: Launch) -> None: ...

    def capture(self, launches: Sequence[Launch]) -> Callable[[], None]: ...

    def seconds(self, one: Launch) -> float:
        """Launch and wait: how long it took on the device."""
        ...

    def close(self) -> None: ...


class CupyLauncher:
    """One device, one non-blocking stream, cubins of its architecture.

    Each thread has a current device of its own: what needs it says so first.
    """

    def __init__(self, device: int = 0) -> None:
        cupy = load_cupy()
        self._cupy = cupy
        self._device = cupy.cuda.Device(device)
        self._device.use()
        self.architecture = for_device(int(self._device.compute_capability))
        if not self.architecture:
            got = f"a GPU of compute capability {self._device.compute_capability}"
            raise KernelError("cuda", got, ", ".join(ARCHITECTURES))
        self.multiprocessors = int(self._device.attributes["MultiProcessorCount"])
        name = cupy.cuda.runtime.getDeviceProperties(device)["name"]
        self.device_name = name.decode() if isinstance(name, bytes) else str(name)
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._functions: dict[tuple[str, str], Any] = {}

    def allocate(self, size: int) -> Buffer:
        self._device.use()
        with self._stream:  # Memory that is freed goes to what this stream does next, in its order.
            memory = self._cupy.cuda.alloc(max(size, 256))
        return Buffer(int(memory.ptr), size, memory)

    def to_device(self, buffer: Buffer, data: Array, offset: int = 0) -> None:
        self._device.use()
        if not data.flags.c_contiguous:
            data = np.ascontiguousarray(data)
        pointer = buffer.owner + offset
        pointer.copy_from_host_async(_address(data), data.nbytes, self._stream)
        if not _is_pinned(data):
            self._stream.synchronize()  # The copy still reads `data`.

    def to_host(self, buffer: Buffer, data: Array, offset: int = 0) -> None:
        self._device.use()
        pointer = buffer.owner + offset
        pointer.copy_to_host_async(_address(data), data.nbytes, self._stream)
        self._stream.synchronize()

    def fill(self, buffer: Buffer, offset: int, size: int) -> None:
        if size:
            (buffer.owner + offset).memset_async(0, size, self._stream)

    def pinned(self, size: int) -> Array:
        memory = self._cupy.cuda.alloc_pinned_memory(max(size, 1))
        whole = np.frombuffer(memory, dtype=np.uint8)
        return whole[:size].view(Pinned)

    def launch(self, one: Launch) -> None:
        self._device.use()
        function = self._function(one)
        with self._stream:
            function(one.grid, (one.threads, 1, 1), one.arguments, shared_mem=one.shared)

    def capture(self, launches: Sequence[Launch]) -> Callable[[], None]:
        self._device.use()
        for one in launches:
            self._function(one)  # Loading a module is no work of a stream: not while it captures.
        self._stream.synchronize()
        with self._stream:
            self._stream.begin_capture()
            for one in launches:
                self.launch(one)
            graph = self._stream.end_capture()
        return lambda: graph.launch(self._stream)

    def seconds(self, one: Launch) -> float:
        begin, end = self._cupy.cuda.Event(), self._cupy.cuda.Event()
        begin.record(self._stream)
        self.launch(one)
        end.record(self._stream)
        end.synchronize()
        return float(self._cupy.cuda.get_elapsed_time(begin, end)) / 1e3

    def synchronize(self) -> None:
        self._stream.synchronize()

    @property
    def stream(self) -> Any:
        return self._stream

    def close(self) -> None:
        self._stream.synchronize()
        self._functions.clear()

    def _function(self, one: Launch) -> Any:
        if (one.unit, one.kernel) not in self._functions:
            self._load(units_by_name()[one.unit])
        return self._functions[one.unit, one.kernel]

    def _load(self, unit: Unit) -> None:
        module = self._cupy.RawModule(path=str(find_cubin(unit, self.architecture)))
        for kernel in unit.kernels:
            function = module.get_function(kernel)
            # Above 48 KiB a kernel must be allowed its shared memory by name.
            limit = self._device.attributes["MaxSharedMemoryPerBlockOptin"]
            static = function.shared_size_bytes
            function.max_dynamic_shared_size_bytes = limit - static
            self._functions[unit.name, kernel] = function


class Pinned(np.ndarray[Any, Any]):
    """Page-locked host memory: a copy from it need not be waited for at once."""


def _is_pinned(data: Array) -> bool:
    return isinstance(data, Pinned)


def _address(data: Array) -> int:
    return int(data.ctypes.data)
