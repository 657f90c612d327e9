"""Weights in safetensors files; fp8 ones as F8_E4M3, whose codes are uint8 in NumPy.

safetensors gives NumPy no such type, and ml_dtypes, which has one, is not wanted in a served
process: those files are written and read by their header here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from samp_kernels.interface import CODES, Array

NAMES = {"float32": "F32", "int32": "I32", "int8": "I8", "uint8": "F8_E4M3"}
"""What a file with fp8 weights may hold, by NumPy's names."""


def save_tensors(path: Path, tensors: Mapping[str, Array]) -> None:
    """The writer dumps the buffer as it lies: a transposed view would be written wrong."""
    from safetensors.numpy import save_file

    whole = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    if not any(array.dtype == CODES["fp8"] for array in whole.values()):
        save_file(whole, path)
        return
    # As the library lays them out: the wider types first, so that all are aligned.
    order = sorted(whole, key=lambda name: (-whole[name].itemsize, name))
    header: dict[str, object] = {}
    end = 0
    for name in order:
        array, begin = whole[name], end
        end += array.nbytes
        kind = NAMES[array.dtype.name]
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            stream.write(np.asarray(whole[name], whole[name].dtype.newbyteorder("<")).tobytes())


def load_tensors(path: Path) -> dict[str, Array]:
    """Every tensor by name. Raises SafetensorError for a damaged file."""
    from safetensors import safe_open
    from safetensors.numpy import load_file

    with safe_open(path, framework="np") as file:
        names = list(file.keys())
        codes = {n for n in names if file.get_slice(n).get_dtype() == NAMES["uint8"]}
        if codes:
            found = {name: file.get_tensor(name) for name in names if name not in codes}
    if not codes:
        return load_file(path)
    # The library has checked the header, and that the file is as long as it says.
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        for name in codes:
            begin, end = header[name]["data_offsets"]
            stream.seek(8 + size + begin)
            held = np.frombuffer(stream.read(end - begin), dtype=CODES["fp8"])
            found[name] = held.reshape(header[name]["shape"])
    return found
