"""Plain tritonclient calls, as any client of Triton would make them."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import np_to_triton_dtype

Arrays = dict[str, Any]


@functools.cache
def client(address: str) -> triton.InferenceServerClient:
    return triton.InferenceServerClient(address)


def infer(address: str, model: str, **inputs: Any) -> Arrays:
    """All outputs of one request; `inputs` are arrays."""
    tensors = []
    for name, array in inputs.items():
        dtype = np_to_triton_dtype(array.dtype)
        tensors.append(triton.InferInput(name, list(array.shape), dtype))
        tensors[-1].set_data_from_numpy(array)
    result = client(address).infer(model, tensors, client_timeout=60)
    names = [output.name for output in result.get_response().outputs]
    return {name: result.as_numpy(name) for name in names}


def text_rows(texts: Sequence[str | bytes]) -> Any:
    """BYTES [b, 1]."""
    raw = [text.encode() if isinstance(text, str) else text for text in texts]
    return np.array(raw, dtype=np.object_)[:, None]


def classify(address: str, ensemble: str, texts: Sequence[str | bytes]) -> Arrays:
    return infer(address, ensemble, TEXT=text_rows(texts))


def classify_all(
    address: str, ensemble: str, requests: Sequence[Sequence[str]], concurrency: int
) -> list[Arrays]:
    """One answer a request, `concurrency` of them in flight at any time."""
    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(lambda texts: classify(address, ensemble, texts), requests))


def alive(address: str, ensemble: str) -> bool:
    """Whether the server still answers an ordinary text."""
    answer = classify(address, ensemble, ["a fine film"])
    return bool(np.isclose(answer["SCORES"].sum(), 1, atol=1e-5))


def counted(read: Callable[[], int], seconds: float = 10) -> int:
    """What one of Triton's counters says once it rests: it moves a moment after the answer left.

    That moment can be long on a busy machine; half a second without a change is taken as rest.
    """
    end = time.monotonic() + seconds
    value, since = read(), time.monotonic()
    while time.monotonic() < min(since + 0.5, end):
        time.sleep(0.02)
        if (now := read()) != value:
            value, since = now, time.monotonic()
    return value
