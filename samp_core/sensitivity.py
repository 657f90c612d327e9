"""What the task loses when one node of the chain changes precision, alone.

Measured: the mean KL divergence to the float model's outputs over the search split, the layers
before the node computed once. Cheap, from one forward and two backward passes over a few rows:
scores that order the work, and stand in for what a time budget leaves unmeasured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from samp_kernels.interface import F32, LARGEST, Array, Batch

from samp_core.chain import Node, plan_of
from samp_core.encoder import LayerInput
from samp_core.heads import softmax_divergence
from samp_core.memory import trim
from samp_core.pipeline import GRADIENT_TOKENS, batches
from samp_core.plan import Plan, Recipe, input_scale
from samp_core.quantize import rounded_weight
from samp_core.text import Encoding
from samp_core.workbench import Split, Workbench

if TYPE_CHECKING:
    from samp_core.torch_encoder import Tap, Tensor

KEPT_BYTES = 1 << 30
"""Hidden states kept while measuring; a split that needs more is measured on an even share."""
CHEAP_ROWS = 128


@dataclass(frozen=True)
class Score:
    """One node in `precision`, every other in fp32; losses in nats a row.

    signed: gradient of the task's loss times the quantization error of the node's input, mean and
    standard error over rows (arXiv 2207.10083, section 3). signed_whole: the same of its output,
    so with the error of its weights. fisher: half the mean squared product of its output's error
    with the Fisher information's root, the second-order KL. sqnr_db: its output's signal to noise.
    kl: measured; None where the budget did not reach it. precision: or a variant's label.
    """

    node: str
    precision: str
    fisher: float | None
    sqnr_db: float
    signed: float | None = None
    signed_error: float | None = None
    signed_whole: float | None = None
    signed_whole_error: float | None = None
    kl: float | None = None

    @property
    def cheap(self) -> float:
        """fisher where the head has a gradient, else the noise power 10^(-sqnr / 10)."""
        power = 10.0 ** (-self.sqnr_db / 10.0)
        return max(power if self.fisher is None else self.fisher, 1e-15)


def cheap_scores(
    bench: Workbench,
    base: Plan,
    nodes: Sequence[Node],
    labels: Sequence[str],
    split: Split,
    rows: int = CHEAP_ROWS,
) -> dict[str, dict[str, Score]]:
    """Scores without `kl`: label of an option -> node that has it -> score.

    Over so many rows, evenly spread; `base` carries the scales. One pass for all.
    """
    options = [node.up_to(label) for label in labels for node in nodes if label in node.labels]
    found: dict[str, dict[str, Score]] = {label: {} for label in labels}
    if not options:
        return found

    def make() -> list[dict[str, Any]]:
        return [asdict(score) for score in _Cheap(bench, base, options).over(split, rows)]

    everything = plan_of(base, nodes, [len(node.options) - 1 for node in nodes])
    key = bench.key(everything, split) | {"rows": rows, "labels": list(labels)}
    for fields in bench.cache.json("cheap", key, make):
        found[fields["precision"]][fields["node"]] = Score(**fields)
    return found


def measured_kl(
    bench: Workbench,
    base: Plan,
    nodes: Sequence[Node],
    split: Split,
    order: Sequence[str],
    stop: Callable[[], bool] = lambda: False,
    rows: int | None = None,
) -> dict[str, float]:
    """KL of each node alone, in that order of names until `stop`; what is cached costs nothing.

    Over so many of the split's pieces, evenly spread; None for all.
    """
    by_name = {node.name: node for node in nodes}
    float_plan = plan_of(base, nodes, [0] * len(nodes))
    every = bench.pieces(split)
    places = np.linspace(0, len(every) - 1, min(rows or len(every), len(every))).astype(int)
    prefixes = _Prefixes(bench, float_plan, [every[place] for place in places.tolist()])
    step = bench.progress("sensitivity: one site at a time", len(order))
    found: dict[str, float] = {}
    for name in order:
        node = by_name[name]
        last = len(node.options) - 1
        plan = plan_of(base, nodes, [last * (other.name == name) for other in nodes])
        key = bench.key(plan, split) | {"kept_bytes": KEPT_BYTES, "rows": len(places)}
        if not stop() or bench.cache.has("kl", key):
            found[name] = float(bench.cache.json("kl", key, lambda: prefixes.kl(plan, node)))  # noqa: B023
        step()
    return found


def estimated(scores: Mapping[str, Score]) -> dict[str, float]:
    """KL of every node: as measured, else its cheap score times the measured ones' median ratio."""
    ratios = [s.kl / s.cheap for s in scores.values() if s.kl is not None and s.kl > 0.0]
    ratio = float(np.median(ratios)) if ratios else 1.0
    return {
        name: score.cheap * ratio if score.kl is None else max(score.kl, 0.0)
        for name, score in scores.items()
    }


def beside(scores: Mapping[str, Score], others: Mapping[str, Score]) -> dict[str, float]:
    """KL of every node of `others` in another option than that of `scores`, not measured itself.

    It differs from that one's as the cheap scores of the two do.
    """
    known = estimated(scores)
    return {name: known[name] * score.cheap / scores[name].cheap for name, score in others.items()}


def with_kl(scores: Mapping[str, Score], found: Mapping[str, float]) -> dict[str, Score]:
    return {name: replace(score, kl=found.get(name)) for name, score in scores.items()}


class _Prefixes:
    """The float model's hidden states before every layer, over texts; made when first needed."""

    def __init__(self, bench: Workbench, plan: Plan, encodings: Sequence[Encoding]) -> None:
        self._bench = bench
        self._plan = plan
        self._encodings = encodings
        self._starts: list[list[LayerInput]] = []
        self._places: Array = np.empty(0, int)
        self._reference: F32 | None = None

    def kl(self, plan: Plan, node: Node) -> float:
        """The layers from the node's own on, under a plan that changes nothing before them."""
        if self._reference is None:
            self._starts = self._begin()
            last = self._bench.checkpoint.config.layers - 1
            self._reference = self._logits(self._plan, last)
        return self._bench.divergence(self._reference, self._logits(plan, node.layer))

    def _begin(self) -> list[list[LayerInput]]:
        packed = batches(self._encodings)
        packed = even_share(packed, self._bench.checkpoint.config)
        self._places = np.argsort(np.concatenate([places for _, places in packed]))
        session = self._bench.loop_session(self._plan)
        step = self._bench.progress("sensitivity: float layers", len(packed))
        starts = []
        for made in self._bench.each(session.layer_inputs, [batch for batch, _ in packed]):
            starts.append(made)
            step()
        return starts

    def _logits(self, plan: Plan, layer: int) -> F32:
        head = self._bench.head
        session = self._bench.loop_session(plan)
        output = head.encoder_output
        kept = [starts[layer] for starts in self._starts]
        features = list(self._bench.each(lambda start: session.run_from(start, output), kept))
        if head.rows is not None:  # a token head's linear layer ran in the encoder
            return np.concatenate(features)
        return np.concatenate([head.logits(self._bench.head_weights, f) for f in features])[
            self._places
        ]


def even_share(packed: Sequence[tuple[Batch, Array]], config: Any) -> list[tuple[Batch, Array]]:
    """As many batches, evenly spread, as have hidden states of at most KEPT_BYTES."""
    tokens = sum(batch.tokens for batch, _ in packed)
    size = 4 * config.hidden * config.layers * tokens
    count = max(1, min(len(packed), int(len(packed) * KEPT_BYTES / max(size, 1))))
    places = np.linspace(0, len(packed) - 1, count).astype(int)
    return [packed[place] for place in places.tolist()]


class _Cheap:
    """Sums over rows for the scores of nodes, each in its last option."""

    def __init__(self, bench: Workbench, base: Plan, nodes: Sequence[Node]) -> None:
        import torch

        from samp_core import torch_encoder

        self._torch, self._encoder = torch, torch_encoder
        self._bench, self._base, self._nodes = bench, base, nodes
        torch.set_num_threads(bench.threads)
        tensors = {k: v for k, v in bench.checkpoint.tensors.items() if v.dtype.kind == "f"}
        self._tensors = torch_encoder.as_tensors(tensors)
        inside = {k: v for k, v in tensors.items() if k.startswith("classifier.")}
        own = bench.head.divergence is not softmax_divergence
        self._head = torch_encoder.as_tensors({} if own else bench.head_weights or inside)
        self._generator = torch.Generator().manual_seed(0)
        self._rows: dict[tuple[int, str], list[Array]] = {}
        self._power = [np.zeros(2) for _ in nodes]

    def over(self, split: Split, rows: int) -> list[Score]:
        pieces = self._bench.pieces(split)
        places = np.unique(np.linspace(0, len(pieces) - 1, rows).astype(int))
        packed = batches([pieces[i] for i in places.tolist()], GRADIENT_TOKENS)
        step = self._bench.progress("sensitivity: gradients", len(packed))
        one_class = self._bench.task.gold == "label"
        labels = np.asarray(split.gold)[places] if one_class else None
        for batch, group in packed:
            self._batch(batch, None if labels is None else labels[group])
            trim()
            step()
        return [self._score(place) for place in range(len(self._nodes))]

    def _batch(self, batch: Batch, labels: Array | None) -> None:
        torch = self._torch
        config, output = self._bench.checkpoint.config, self._bench.head.encoder_output
        feature, taps = self._encoder.forward(self._tensors, config, batch, output)
        by_name = {tap.name: tap for tap in taps}
        names = list(dict.fromkeys(node.name for node in self._nodes))
        outputs = [by_name[name].y for name in names]
        gradients: dict[str, dict[str, Tensor]] = {}
        logits = self._encoder.head_logits(self._head, feature)
        if logits is not None:
            if labels is not None:
                gold = torch.from_numpy(labels.astype(np.int64))
                loss = torch.nn.functional.cross_entropy(logits, gold, reduction="sum")
                of_loss = torch.autograd.grad(loss, outputs, retain_graph=True)
                gradients["signed"] = dict(zip(names, of_loss, strict=True))
            # v = sum_c e_c sqrt(p_c) (1_c - p), e = +-1: E[(v . dz)^2] = dz^T (diag p - p p^T) dz
            p = torch.softmax(logits.detach(), dim=-1)
            signs = torch.randint(0, 2, p.shape, generator=self._generator) * 2.0 - 1.0
            root = signs * p.sqrt()
            scalar = (logits * (root - p * root.sum(-1, keepdim=True))).sum()
            of_scalar = torch.autograd.grad(scalar, outputs)
            gradients["fisher"] = dict(zip(names, of_scalar, strict=True))
        lengths = torch.from_numpy(np.diff(batch.cu_seqlens).astype(np.int64))
        row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        with torch.no_grad():
            for place, node in enumerate(self._nodes):
                tap = by_name[node.name]
                whole, from_input = self._errors(node, tap, batch)
                self._power[place] += [float((tap.y**2).sum()), float((whole**2).sum())]
                for kind, error in (
                    ("fisher", whole), ("signed", from_input), ("signed_whole", whole),
                ):  # fmt: skip
                    found = gradients.get(kind.removesuffix("_whole"))
                    if found is not None:
                        each = torch.zeros(len(lengths), dtype=torch.float64)
                        each.index_add_(0, row, (found[node.name] * error).sum(1).double())
                        self._rows.setdefault((place, kind), []).append(each.numpy())

    def _errors(self, node: Node, tap: Tap, batch: Batch) -> tuple[Tensor, Tensor]:
        """The error of the node's quantized output, and the part of it that its input makes."""
        option, precision = node.options[-1], node.precisions[-1]
        scales = {**self._base.scales, **node.scales(len(node.options) - 1)}
        round8 = self._encoder.ROUNDED[precision]
        if len(node.sites) > 1:
            scores, context = node.sites
            scale = {}
            if option[scores].precision != "fp32":
                scale.update({part: scales[f"{scores}.{part}_scale"] for part in "qk"})
            if option[context].precision != "fp32":
                scale.update({part: scales[f"{context}.{part}_scale"] for part in "pv"})

            def rounded(part: str, x: Tensor) -> Tensor:
                return round8(x, scale[part]) if part in scale else x

            heads, bounds = self._bench.checkpoint.config.heads, batch.cu_seqlens.tolist()
            bias = self._tensors.get("position_bias")
            error = self._encoder.attention(tap.x, bounds, heads, rounded, bias) - tap.y
            return error, error
        (site,) = node.sites
        recipe = option[site].recipe or Recipe()
        weight = self._tensors[f"{site}.weight"]
        if recipe.activation == "token":
            scale_x: Any = tap.x.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
            scale_x = scale_x / LARGEST[precision]
        else:
            scale_x = scales[input_scale(site, precision)]
        x = round8(tap.x, scale_x)
        apart = sorted(self._base.outliers.get(site, ())[: recipe.outliers])
        tensors, memo = self._bench.checkpoint.tensors, self._bench.quantized
        stored = self._torch.from_numpy(
            rounded_weight(tensors, site, recipe, apart, precision, memo)
        )
        x[:, apart] = tap.x[:, apart]
        from_input = (x - tap.x) @ weight.T
        return from_input + x @ (stored - weight).T, from_input

    def _score(self, place: int) -> Score:
        def mean(kind: str) -> tuple[float | None, float | None]:
            if (place, kind) not in self._rows:
                return None, None
            values = np.concatenate(self._rows[place, kind])
            return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))

        signal, noise = self._power[place]
        rows = self._rows.get((place, "fisher"))
        squares = None if rows is None else float(0.5 * (np.concatenate(rows) ** 2).mean())
        return Score(
            self._nodes[place].name,
            self._nodes[place].labels[-1],
            squares,
            float(10.0 * np.log10(signal / max(noise, 1e-300))),
            *mean("signed"),
            *mean("signed_whole"),
        )


def listed(scores: Mapping[str, Score], kl: Mapping[str, float]) -> list[dict[str, Any]]:
    """Scores as build.json has them; kl: what each node is taken to lose."""
    return [{**asdict(score), "estimate": kl[name]} for name, score in scores.items()]
