"""What each recipe costs at each site, alone: the model's outputs moved to second order, in nats.

One forward pass of the float model and two backward passes give g, random directions in which the
outputs' divergence is felt (see `_direction`). A site whose output is off by e then costs about
mean (g . e)^2 / 2 a row. For a GEMM g . e = (g W') x' - (g W) x: another recipe for x' costs
no other product. A plain ||e||^2 would do for random data; here single channels are hundreds of
times louder than the rest, and the layer norm behind them hardly hears them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from samp_kernels.interface import GEMM_SITES, Batch

from samp_core import calibrate
from samp_core.calibrate import Ranges
from samp_core.heads import softmax_divergence
from samp_core.memory import trim
from samp_core.pipeline import GRADIENT_TOKENS, batches
from samp_core.plan import Recipe, recipe_of
from samp_core.quantize import Memo, rounded_weight
from samp_core.text import Encoding
from samp_core.workbench import Split, Workbench

if TYPE_CHECKING:
    from samp_core.torch_encoder import Tap, Tensor

ROWS = 96
TOKENS = 2560
"""At most so many rows of the split, and about so many tokens of them."""
PROBES = 2

Errors = dict[str, dict[str, float]]
"""site -> name of an option -> cost in nats a row."""


def measured_errors(
    bench: Workbench,
    split: Split,
    ranges: Ranges,
    options: Mapping[str, Recipe],
    stop: Callable[[], bool] = lambda: False,
) -> Errors:
    """The cost of every option at every site, over a share of a split; found again in the cache.

    After `stop`, over the texts so far, which the cache does not keep; empty where there are none.
    """

    def make() -> Errors:
        packed = [batch for batch, _ in batches(sample(bench.pieces(split)), GRADIENT_TOKENS)]
        step = bench.progress("calibrate: what each recipe costs at each site", len(packed))
        measuring = _Measuring(bench, ranges, options)
        for batch in packed:
            if stop():
                raise _Stopped(measuring.errors())
            measuring.add(batch)
            trim()
            step()
        return measuring.errors()

    key = bench.key(bench.base_plan(), split)
    asked = {"options": list(options), "rows": ROWS, "tokens": TOKENS, "probes": PROBES}
    try:
        found: Errors = bench.cache.json("errors", {**key, **asked}, make)
    except _Stopped as stopped:
        found = stopped.errors
    return found


class _Stopped(Exception):
    """The time is up; the errors so far."""

    def __init__(self, errors: Errors) -> None:
        super().__init__()
        self.errors = errors


def sample(pieces: Sequence[Encoding]) -> list[Encoding]:
    """Up to ROWS of them, evenly spread over lengths, with about TOKENS tokens, at least eight."""
    ordered = sorted(pieces, key=lambda e: len(e.ids))
    mean = sum(len(e.ids) for e in ordered) / len(ordered)
    count = min(ROWS, max(8, int(TOKENS / max(mean, 1.0))), len(ordered))
    places = ((np.arange(count) + 0.5) / count * len(ordered)).astype(int)
    return [ordered[place] for place in places.tolist()]


class _Measuring:
    """Squares of g . e by site and option; options with the same scales are computed once."""

    def __init__(self, bench: Workbench, ranges: Ranges, options: Mapping[str, Recipe]) -> None:
        import torch

        from samp_core import torch_encoder

        self._torch, self._encoder = torch, torch_encoder
        torch.set_num_threads(bench.threads)
        self._config, self._output = bench.checkpoint.config, bench.head.encoder_output
        self._floats = {k: v for k, v in bench.checkpoint.tensors.items() if v.dtype.kind == "f"}
        self._tensors = torch_encoder.as_tensors(self._floats)
        inside = {k: v for k, v in self._floats.items() if k.startswith("classifier.")}
        self._head = torch_encoder.as_tensors(bench.head_weights or inside)
        self._softmax = bench.head.divergence is softmax_divergence
        self._options = options
        self._scales = {name: calibrate.scales(ranges, r) for name, r in options.items()}
        self._apart = {name: calibrate.outliers(ranges, r) for name, r in options.items()}
        self._generator = torch.Generator().manual_seed(0)
        self._memo: Memo = {}  # its own: few of the options will be any plan's
        self._sums: dict[str, dict[str, float]] = {}
        self._rows = 0

    def errors(self) -> Errors:
        count = 2.0 * PROBES * max(self._rows, 1)
        return {
            site: {name: total / count for name, total in sums.items()}
            for site, sums in self._sums.items()
        }

    def add(self, batch: Batch) -> None:
        torch = self._torch
        feature, taps = self._encoder.forward(self._tensors, self._config, batch, self._output)
        outputs = [tap.y for tap in taps]
        lengths = torch.from_numpy(np.diff(batch.cu_seqlens).astype(np.int64))
        row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        felt = self._encoder.head_logits(self._head, feature)
        scalars = [self._direction(feature, felt) for _ in range(PROBES)]
        gradients = [torch.autograd.grad(s, outputs, retain_graph=True) for s in scalars]
        with torch.no_grad():
            for place, tap in enumerate(taps):
                directions = [found[place] for found in gradients]
                if tap.name.endswith(".attention"):
                    self._attention(tap, directions, batch, row)
                elif tap.name.rsplit(".", 1)[1] in GEMM_SITES:
                    self._gemm(tap, directions, row)
        self._rows += len(lengths)

    def _direction(self, feature: Tensor, logits: Tensor | None) -> Tensor:
        """v . outputs, with E[(v . dz)^2] = dz^T F dz.

        F is the softmax's Fisher information, v = sum_c e_c sqrt(p_c) (1_c - p) with e = +-1; for
        another divergence F = 1, v = +-1, over logits or over features of length 1.
        """
        torch = self._torch
        outputs = feature / feature.norm(dim=-1, keepdim=True) if logits is None else logits
        signs = torch.randint(0, 2, outputs.shape, generator=self._generator) * 2.0 - 1.0
        if logits is None or not self._softmax:
            plain: Tensor = (outputs * signs).sum()
            return plain
        p = torch.softmax(logits.detach(), dim=-1)
        root = signs * p.sqrt()
        directed: Tensor = (logits * (root - p * root.sum(-1, keepdim=True))).sum()
        return directed

    def _gemm(self, tap: Tap, directions: Sequence[Tensor], row: Tensor) -> None:
        site, weight = tap.name, self._tensors[f"{tap.name}.weight"]
        wanted = [(g @ weight * tap.x).sum(1) for g in directions]
        through: dict[tuple[Any, ...], list[Tensor]] = {}

        def error(name: str) -> list[Tensor]:
            recipe = recipe_of(self._options[name], site)
            apart = sorted(self._apart[name].get(site, []))
            if recipe.activation == "token":
                scale: Any = tap.x.abs().amax(dim=1, keepdim=True).clamp(min=1e-8) / 127.0
            else:
                scale = self._scales[name][f"{site}.input_scale"]
            x = self._encoder.rounded_to_int8(tap.x, scale)
            x[:, apart] = tap.x[:, apart]
            key = (recipe.weight, tuple(apart))
            if key not in through:
                made = rounded_weight(self._floats, site, recipe, apart, "int8", self._memo)
                stored = self._torch.from_numpy(made)
                through[key] = [g @ stored for g in directions]
            seen = zip(through[key], wanted, strict=True)
            return [(g * x).sum(1) - y for g, y in seen]

        self._count(site, row, error)

    def _attention(self, tap: Tap, directions: Sequence[Tensor], batch: Batch, row: Tensor) -> None:
        layer, bounds = tap.name.removesuffix(".attention"), batch.cu_seqlens.tolist()
        bias = [self._tensors["position_bias"]] if "position_bias" in self._tensors else []

        def error_of(site: str, parts: str) -> Callable[[str], list[Tensor]]:
            def error(name: str) -> list[Tensor]:
                scales = self._scales[name]

                def rounded(part: str, x: Tensor) -> Tensor:
                    if part not in parts:
                        return x
                    q: Tensor = self._encoder.rounded_to_int8(x, scales[f"{site}.{part}_scale"])
                    return q

                y = self._encoder.attention(tap.x, bounds, self._config.heads, rounded, *bias)
                return [(g * (y - tap.y)).sum(1) for g in directions]

            return error

        for kind, parts in (("scores", "qk"), ("context", "pv")):
            site = f"{layer}.{kind}"
            self._count(site, row, error_of(site, parts))

    def _count(self, site: str, row: Tensor, error: Callable[[str], list[Tensor]]) -> None:
        """Add the squares, row by row, of every option's g . e, given token by token."""
        sums = self._sums.setdefault(site, {})
        known: dict[tuple[Any, ...], float] = {}
        for name in self._options:
            key = self._key(site, name)
            if key not in known:
                each = self._torch.zeros(int(row.max()) + 1, dtype=self._torch.float64)
                made = [each.index_add(0, row, tokens.double()) for tokens in error(name)]
                known[key] = float(sum((rows**2).sum() for rows in made))
            sums[name] = sums.get(name, 0.0) + known[key]

    def _key(self, site: str, name: str) -> tuple[Any, ...]:
        """What an option's error at a site depends on."""
        recipe = recipe_of(self._options[name], site)
        if recipe.activation == "token":
            return ("token", recipe.weight)
        scales = [v for k, v in self._scales[name].items() if k.startswith(f"{site}.")]
        return (recipe.weight, recipe.outliers, *scales)
