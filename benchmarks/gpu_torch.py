"""The peer of gpu_check.py: the same encoder in torch fp16, padded, eager and compiled.

    python benchmarks/gpu_torch.py --part FILE --work '{"layers": .., "cases": {name: lengths}}'

A process of its own, which may be stopped: compiling takes long and cannot be interrupted, and what
was found by then stands in FILE. Every case is first compiled a layer at a time by max-autotune,
all layers in one CUDA graph, which takes as long as one layer; then, while there is time, the whole
model by torch.compile(mode="max-autotune"). It has never run on hardware.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gpu_report import write_json

FLUSH = 256 << 20  # bytes written before each timed call; more than any L2
ROUNDS = 30
EPS = 1e-12
GRAPHED = "torch fp16 in a CUDA graph, us"
BY_LAYER = "torch.compile max-autotune by layer in a CUDA graph, us"
WHOLE = "torch.compile max-autotune, us"


def layer(
    x: Any, mask: Any, heads: int, qkv: Any, qkv_bias: Any, out: Any, out_bias: Any, first: Any,
    first_bias: Any, up: Any, up_bias: Any, down: Any, down_bias: Any, second: Any,
    second_bias: Any,
) -> Any:  # fmt: skip
    """x [rows, longest, hidden]; mask [rows, 1, 1, longest], true where there is a token, or None.
    Weights are parameters, so that one compilation serves all layers."""
    from torch.nn import functional as F

    rows, longest, hidden = x.shape
    parts = F.linear(x, qkv, qkv_bias).view(rows, longest, 3, heads, hidden // heads)
    q, k, v = parts.permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    y = F.linear(y.transpose(1, 2).reshape(rows, longest, hidden), out, out_bias)
    x = F.layer_norm(x + y, (hidden,), first, first_bias, EPS)
    y = F.linear(F.gelu(F.linear(x, up, up_bias)), down, down_bias)
    return F.layer_norm(x + y, (hidden,), second, second_bias, EPS)


def encode(x: Any, mask: Any, heads: int, weights: Sequence[Sequence[Any]], step: Any) -> Any:
    """`step` is `layer`, as it is or compiled."""
    for one in weights:
        x = step(x, mask, heads, *one)
    return x


def model_of(heads: int, weights: Sequence[Sequence[Any]]) -> Any:
    """The same as a module: CUDA graphs of torch.compile would copy weights that are arguments."""
    import torch

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(
                torch.nn.ParameterList(torch.nn.Parameter(w, requires_grad=False) for w in one)
                for one in weights
            )

        def forward(self, x: Any, mask: Any) -> Any:
            return encode(x, mask, heads, self.layers, layer)

    return Encoder().eval()


def random_weights(layers: int, hidden: int, ffn: int, device: str, dtype: Any) -> list[list[Any]]:
    """In the order of `layer`'s parameters, of a size that keeps activations of size 1."""
    import torch

    def linear(rows: int, columns: int) -> list[Any]:
        weight = torch.randn(rows, columns, device=device) / math.sqrt(columns)
        return [weight.to(dtype), torch.zeros(rows, device=device, dtype=dtype)]

    def norm() -> list[Any]:
        ones = torch.ones(hidden, device=device, dtype=dtype)
        return [ones, torch.zeros_like(ones)]

    return [
        [*linear(3 * hidden, hidden), *linear(hidden, hidden), *norm(),
         *linear(ffn, hidden), *linear(hidden, ffn), *norm()]
        for _ in range(layers)
    ]  # fmt: skip


def mask_of(lengths: Sequence[int], device: str) -> Any:
    """[rows, 1, 1, longest], or None where all are of one length."""
    import torch

    if min(lengths) == max(lengths):
        return None
    places = torch.arange(max(lengths), device=device)[None, :]
    return (places < torch.tensor(lengths, device=device)[:, None])[:, None, None, :]


def timed(call: Callable[[], Any]) -> float:
    """Median microseconds on the device, from a cold L2."""
    import torch

    memory = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for turn in range(ROUNDS + 5):
        memory.fill_(turn)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return float(statistics.median(times[5:]))


def graphed(call: Callable[[], Any]) -> Callable[[], None]:
    """`call` as one CUDA graph."""
    import torch

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    replay: Callable[[], None] = graph.replay
    return replay


def measure(work: dict[str, Any], part: Path) -> None:
    """Write microseconds of every case, after each of them."""
    import torch

    weights = random_weights(work["layers"], work["hidden"], work["ffn"], "cuda", torch.float16)
    heads, cases = work["heads"], work["cases"]
    model = model_of(heads, weights)
    own = torch.compile(layer, mode="max-autotune-no-cudagraphs", dynamic=False, fullgraph=True)
    found: dict[str, dict[str, Any]] = {case: {} for case in cases}

    def inputs(lengths: Sequence[int]) -> tuple[Any, Any]:
        shape = (len(lengths), max(lengths), work["hidden"])
        x = torch.randn(shape, device="cuda", dtype=torch.float16)
        return x, mask_of(lengths, "cuda")

    def in_a_graph(lengths: Sequence[int], step: Any) -> float:
        return timed(graphed(partial(encode, *inputs(lengths), heads, weights, step)))

    def whole(lengths: Sequence[int]) -> float:
        call = partial(torch.compile(model, mode="max-autotune", dynamic=False), *inputs(lengths))
        for _ in range(3):
            call()
        return timed(call)

    ways = {
        GRAPHED: partial(in_a_graph, step=layer),
        BY_LAYER: partial(in_a_graph, step=own),
        WHOLE: whole,
    }
    with torch.inference_mode():
        for name, way in ways.items():
            for case, lengths in cases.items():
                try:
                    found[case][name] = way(lengths)
                except Exception as error:
                    found[case][name] = f"{type(error).__name__}: {error}"[:300]
                write_json(part, found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", type=Path, required=True)
    parser.add_argument("--work", type=json.loads, required=True)
    options = parser.parse_args()
    measure(options.work, options.part)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
