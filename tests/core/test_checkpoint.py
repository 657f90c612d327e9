"""Checkpoints: every way in which a good one is written, and every bad one as one clear error."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bert import Shape, write_bert
from safetensors.torch import load_file, save_file
from samp_kernels.interface import EncoderConfig

from samp_core.checkpoint import encoder_config, load_checkpoint
from samp_core.errors import SampError

SHAPE = Shape(layers=2, hidden=32, heads=2, ffn=40, classifier=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_bert(tmp_path, SHAPE)
    return tmp_path


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def edit_state(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)


def pickled(folder: Path, content: Any) -> Path:
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save(content, file)
    return file


def refuse(folder: Path, *words: str, code: str = "bad_checkpoint") -> SampError:
    """One clear error that names the folder and these words."""
    with pytest.raises(SampError) as caught:
        load_checkpoint(folder)
    error = caught.value
    assert error.code == code
    assert str(folder) in error.given
    assert error.allowed
    assert error.fix
    assert "\n" not in str(error)
    for word in words:
        assert word in str(error)
    return error


# good ones


def test_what_is_read(folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    assert checkpoint.config == EncoderConfig("bert", 2, 32, 2, 40, 50, 32, 2, 1e-12, "gelu")
    assert checkpoint.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    state = load_file(folder / "model.safetensors")
    assert set(checkpoint.state) == set(state)
    prefix = "bert.encoder.layer.1."
    parts = [state[f"{prefix}attention.self.{n}.weight"] for n in ("query", "key", "value")]
    assert np.array_equal(checkpoint.tensors["layer.1.qkv.weight"], torch.cat(parts).numpy())
    for ours, theirs in (
        ("out.weight", "attention.output.dense.weight"),
        ("ffn_in.bias", "intermediate.dense.bias"),
        ("ffn_out.weight", "output.dense.weight"),
        ("attention_ln.bias", "attention.output.LayerNorm.bias"),
        ("output_ln.weight", "output.LayerNorm.weight"),
    ):
        wanted = state[prefix + theirs].numpy()
        assert np.array_equal(checkpoint.tensors[f"layer.1.{ours}"], wanted)
    assert all(t.dtype == np.float32 for t in checkpoint.tensors.values())
    assert checkpoint.plan_config() == {
        "family": "bert", "layers": 2, "hidden": 32, "heads": 2, "ffn": 40,
    }  # fmt: skip


@pytest.mark.parametrize(
    "shape",
    [
        Shape(2, 32, 2, 40, classifier=True, old_names=True),
        Shape(2, 32, 2, 40, classifier=True, safetensors=False),
        Shape(2, 32, 2, 40, classifier=True, old_names=True, safetensors=False),
    ],
    ids=["gamma and beta", "pickled", "both"],
)
def test_other_ways_of_writing_hold_the_same(shape: Shape, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_bert(other, shape)
    wanted, got = load_checkpoint(folder), load_checkpoint(other)
    assert got.config == wanted.config
    assert got.tensors.keys() == wanted.tensors.keys()
    assert all(np.array_equal(got.tensors[k], wanted.tensors[k]) for k in wanted.tensors)


def test_no_prefix(folder: Path, tmp_path: Path) -> None:
    edit_state(folder, lambda s: s.update({k.removeprefix("bert."): s.pop(k) for k in list(s)}))
    assert "encoder.layer.0.output.dense.weight" in load_checkpoint(folder).state


def test_shards_are_one_checkpoint(folder: Path) -> None:
    whole = load_checkpoint(folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    for i, half in enumerate((names[::2], names[1::2])):
        save_file({k: state[k] for k in half}, folder / f"model-0000{i + 1}-of-00002.safetensors")
    sharded = load_checkpoint(folder)
    assert all(np.array_equal(sharded.tensors[k], whole.tensors[k]) for k in whole.tensors)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refuse(folder, "no tensor bert.")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype: torch.dtype, folder: Path) -> None:
    edit_state(folder, lambda s: s.update({k: v.to(dtype) for k, v in s.items()}))
    weight = load_checkpoint(folder).tensors["layer.0.out.weight"]
    assert weight.dtype == np.float32
    assert np.array_equal(torch.from_numpy(weight).to(dtype).float().numpy(), weight)


def test_the_digest_is_of_the_content(folder: Path, tmp_path: Path) -> None:
    first = load_checkpoint(folder).sha256
    (folder / "README.md").write_text("anything")
    assert load_checkpoint(folder).sha256 == first
    edit_state(folder, lambda s: s["bert.pooler.dense.bias"].add_(1e-3))
    second = load_checkpoint(folder).sha256
    edit_config(folder, layer_norm_eps=1e-6)
    assert len({first, second, load_checkpoint(folder).sha256}) == 3


def test_labels(folder: Path) -> None:
    edit_config(folder, id2label={str(i): f"star {i}" for i in reversed(range(11))})
    assert load_checkpoint(folder).labels == tuple(f"star {i}" for i in range(11))
    edit_config(folder, id2label="absent", num_labels=1)
    assert load_checkpoint(folder).labels == ("LABEL_0",)


@pytest.mark.parametrize(
    ("hf", "ours"),
    [
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("relu", "relu"),
    ],
)
def test_activations(hf: str, ours: str, folder: Path) -> None:
    """Ours is what transformers computes under that name."""
    import torch.nn.functional as F
    from transformers.activations import ACT2FN

    edit_config(folder, hidden_act=hf)
    assert load_checkpoint(folder).config.act == ours
    x = torch.linspace(-4, 4, 101)
    wanted = {"gelu": F.gelu(x), "gelu_tanh": F.gelu(x, approximate="tanh"), "relu": F.relu(x)}
    assert torch.allclose(ACT2FN[hf](x), wanted[ours], atol=1e-6)


# bad ones


def test_no_folder(tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", "no config.json", "no such folder")
    (tmp_path / "notes.txt").write_text("")
    refuse(tmp_path, "no config.json", "notes.txt", "save_pretrained")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "not JSON"),
        (b'{"model_type": "bert",', "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[]", "it holds a list"),
        (b'"bert"', "it holds a str"),
    ],
)
def test_a_broken_config(content: bytes, word: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(content)
    refuse(folder, word)


@pytest.mark.parametrize("family", ["electra", "gpt2", "BERT", "absent"])
def test_another_architecture(family: str, folder: Path) -> None:
    edit_config(folder, model_type=family)
    error = refuse(folder, "allowed: model_type bert", code="unsupported_architecture")
    assert repr(None if family == "absent" else family) in error.given


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": "absent"}, ["lacks 'hidden_size'"]),
        ({"vocab_size": "absent"}, ["lacks 'vocab_size'"]),
        ({"num_hidden_layers": 0}, ["0 layers"]),
        ({"num_attention_heads": 0}, ["0 heads"]),
        ({"num_attention_heads": 3}, ["hidden 32, 3 heads", "multiple"]),
        ({"intermediate_size": -40}, ["one layer or more"]),
        ({"hidden_size": "wide"}, ["'wide'", "numbers"]),
        ({"layer_norm_eps": None}, ["NoneType", "numbers"]),
        ({"hidden_act": "silu"}, ["hidden_act 'silu'", "gelu"]),
        ({"position_embedding_type": "relative_key"}, ["relative_key", "absolute"]),
        ({"id2label": {"no": "yes"}}, ["id2label"]),
        ({"id2label": ["no", "yes"]}, ["id2label"]),
        ({"id2label": {"1": "no", "2": "yes"}}, ["id2label"]),
    ],
    ids=str,
)
def test_a_wrong_config(changes: dict[str, Any], words: list[str], folder: Path) -> None:
    edit_config(folder, **changes)
    refuse(folder, *words)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.h5")
    refuse(folder, "has no weights", "model.h5", "*.safetensors or pytorch_model.bin")


@pytest.mark.parametrize("keep", [0, 4, 200, 0.5, -1])
def test_truncated_safetensors(keep: float, folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    cut = int(keep * len(content)) if isinstance(keep, float) else keep
    file.write_bytes(content[:cut])
    refuse(folder, "model.safetensors", "truncated or damaged", "bytes")


def test_a_pointer_in_place_of_the_weights(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 133466304\n"
    (folder / "model.safetensors").write_text(pointer)
    refuse(folder, "model.safetensors", "truncated or damaged")


NAME = "bert.encoder.layer.1.intermediate.dense.weight"


@pytest.mark.parametrize(
    "name", [NAME, "bert.embeddings.LayerNorm.bias", "bert.embeddings.word_embeddings.weight"]
)
def test_a_missing_tensor(name: str, folder: Path) -> None:
    edit_state(folder, lambda s: s.pop(name))
    refuse(folder, f"no tensor {name}")


def test_a_wrong_shape(folder: Path) -> None:
    edit_state(folder, lambda s: s.update({NAME: s[NAME][:39].clone()}))
    refuse(folder, f"{NAME} is [39, 32]; allowed: [40, 32]")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [NAME, "bert.embeddings.position_embeddings.weight"])
def test_weights_that_are_not_finite(value: float, name: str, folder: Path) -> None:
    edit_state(folder, lambda s: s[name][-1].fill_(value))
    refuse(folder, f"{name} holds NaN or infinity")


class Payload:
    """Writes a file when it is unpickled by a loader that executes what it reads."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("where", ["a tensor", "the whole", "a plain pickle"])
def test_pickled_code_is_never_executed(where: str, folder: Path) -> None:
    mark = folder / "executed"
    payload: Any = Payload(mark)
    state = load_file(folder / "model.safetensors")
    file = pickled(folder, {**state, NAME: payload} if where == "a tensor" else payload)
    if where == "a plain pickle":
        file.write_bytes(pickle.dumps({NAME: payload}, protocol=2))
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert mark.is_dir(), "the payload does nothing, so this test proves nothing"
    mark.rmdir()
    error = refuse(folder, "pytorch_model.bin", "no pickled code")
    assert not mark.exists()
    assert len(str(error)) < 600


def test_safetensors_win_over_a_pickle(folder: Path) -> None:
    torch.save(Payload(folder / "executed"), folder / "pytorch_model.bin")
    load_checkpoint(folder)
    assert not (folder / "executed").exists()


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}}, {"step": 3}, torch.zeros(3)])
def test_a_pickle_of_something_else(content: Any, folder: Path) -> None:
    pickled(folder, content)
    refuse(folder, "pytorch_model.bin", "state_dict")


@pytest.mark.parametrize("keep", [0, 100, -1000])
def test_a_truncated_pickle(keep: int, folder: Path) -> None:
    file = pickled(folder, load_file(folder / "model.safetensors"))
    file.write_bytes(file.read_bytes()[:keep])
    refuse(folder, "pytorch_model.bin", "not loadable as plain weights")


def test_encoder_config_is_pure() -> None:
    hf = {
        "model_type": "bert", "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2,
        "intermediate_size": 16, "vocab_size": 5, "max_position_embeddings": 6,
    }  # fmt: skip
    config = encoder_config(hf, Path("anywhere"))
    assert config == EncoderConfig("bert", 1, 8, 2, 16, 5, 6, 2, 1e-12, "gelu", 0)
    assert config.head_dim == 4
