"""A Hugging Face checkpoint -> EncoderConfig and named weights. Families map onto one encoder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from samp_kernels.interface import Activation, Array, EncoderConfig

from samp_core.errors import SampError
from samp_core.families import FAMILIES, position_bias

_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True)
class Checkpoint:
    """`tensors` are the encoder's, under our names; `state` holds every tensor under its own."""

    folder: Path
    config: EncoderConfig
    hf_config: Mapping[str, Any]
    tensors: Mapping[str, Array]
    state: Mapping[str, Array]
    labels: tuple[str, ...]
    sha256: str

    def plan_config(self) -> dict[str, Any]:
        """The part of the config that a plan carries."""
        c = self.config
        return {
            "family": c.family,
            "layers": c.layers,
            "hidden": c.hidden,
            "heads": c.heads,
            "ffn": c.ffn,
        }


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint folder. Never executes pickled code. Raises SampError."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        found = (
            sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
        )
        raise SampError(
            "bad_checkpoint",
            f"{folder} has no config.json (found: {found})",
            "a Hugging Face folder: config.json, tokenizer files, *.safetensors",
            "save the model with save_pretrained() and give that folder",
        )
    try:
        hf = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _broken(config_file, f"it is not JSON ({error})") from None
    if not isinstance(hf, dict):
        raise _broken(config_file, f"it holds a {type(hf).__name__}", "a JSON object")
    config = encoder_config(hf, folder)
    files = _weight_files(folder)
    state = dict(_read_state(files))
    tensors = encoder_tensors(state, config, hf, folder)
    sha256 = _content_sha256(hf, files)
    return Checkpoint(folder, config, hf, tensors, state, _labels(hf, config_file), sha256)


def checkpoint_sha256(folder: Path) -> str | None:
    """The `sha256` that a checkpoint of this folder has; None where the folder holds none."""
    try:
        hf = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return _content_sha256(hf, _weight_files(folder))
    except (OSError, ValueError, SampError):
        return None


def encoder_config(hf: Mapping[str, Any], folder: Path) -> EncoderConfig:
    """config.json -> EncoderConfig. Raises SampError for another architecture."""
    name = str(hf.get("model_type"))
    family = FAMILIES.get(name)
    if family is None:
        raise SampError(
            "unsupported_architecture",
            f"{folder}: model_type {name!r} (architectures {hf.get('architectures')})",
            f"model_type {', '.join(FAMILIES)}",
            "give a checkpoint of one of these families",
        )
    keys = family.keys
    act = _ACTIVATIONS.get(str(hf.get(keys["act"], "gelu")))
    if act is None:
        allowed = ", ".join(_ACTIVATIONS)
        raise _broken(folder, f"{keys['act']} {hf[keys['act']]!r}", allowed)
    position = hf.get("position_embedding_type", "absolute")
    if position != "absolute":
        raise _broken(folder, f"position_embedding_type {position!r}", "absolute")
    try:
        config = EncoderConfig(
            family=name,
            layers=int(hf[keys["layers"]]),
            hidden=int(hf[keys["hidden"]]),
            heads=int(hf[keys["heads"]]),
            ffn=int(hf[keys["ffn"]]),
            vocab=int(hf[keys["vocab"]]),
            positions=int(hf[keys["positions"]]) - family.offset(_pad(hf)),
            types=int(hf.get("type_vocab_size", 2)) if family.types else 2,
            eps=float(hf.get("layer_norm_eps", 1e-12)),
            act=act,
            position_bias=bool(family.buckets),
        )
    except KeyError as error:
        raise _broken(folder, f"config.json lacks {error}", "a complete config.json") from None
    except (TypeError, ValueError) as error:
        raise _broken(folder, f"config.json: {error}", "numbers for the sizes") from None
    sizes = (config.layers, config.hidden, config.heads, config.ffn, config.vocab, config.positions)
    if min(sizes) < 1 or config.hidden % config.heads:
        got = f"{config.layers} layers, hidden {config.hidden}, {config.heads} heads"
        raise _broken(folder, got, "one layer or more, hidden a multiple of heads")
    return config


def _pad(hf: Mapping[str, Any]) -> int:
    pad = hf.get("pad_token_id")
    return 1 if pad is None else int(pad)


def _content_sha256(hf: Mapping[str, Any], files: Sequence[Path]) -> str:
    digest = hashlib.sha256(json.dumps(hf, sort_keys=True).encode())
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _labels(hf: Mapping[str, Any], file: Path) -> tuple[str, ...]:
    """id2label in the order of the logits."""
    count = hf.get("num_labels", 2)
    names = hf.get("id2label") or {str(i): f"LABEL_{i}" for i in range(count)}
    keys = [str(i) for i in range(len(names))]
    if not isinstance(names, dict) or set(names) != set(keys):
        raise _broken(file, f"id2label {str(names)[:80]}", 'names under "0", "1", ...')
    return tuple(str(names[key]) for key in keys)


def _broken(path: Path, given: str, allowed: str = "an intact file") -> SampError:
    return SampError(
        "bad_checkpoint", f"{path}: {given}", allowed, "save or copy the checkpoint again"
    )


def _weight_files(folder: Path) -> list[Path]:
    safetensors = sorted(folder.glob("*.safetensors"))
    if safetensors:
        return safetensors
    pickled = folder / "pytorch_model.bin"
    if pickled.is_file():
        return [pickled]
    raise SampError(
        "bad_checkpoint",
        f"{folder} has no weights (found: {sorted(p.name for p in folder.iterdir())[:8]})",
        "*.safetensors or pytorch_model.bin",
        "save the model with save_pretrained() and give that folder",
    )


def _read_safetensors(file: Path) -> Iterator[tuple[str, Array]]:
    """Every tensor in fp32; torch is needed only for types that NumPy lacks, bf16 above all."""
    from safetensors import safe_open

    with safe_open(file, framework="np") as reader:
        names = list(reader.keys())
        kinds = {reader.get_slice(name).get_dtype() for name in names}
        if kinds <= {"F16", "F32", "F64", "I32", "I64", "BOOL"}:
            for name in names:
                yield name, reader.get_tensor(name).astype(np.float32, copy=False)
            return
    with safe_open(file, framework="pt") as reader:
        for name in names:
            yield name, reader.get_tensor(name).float().numpy()


def _read_state(files: list[Path]) -> Iterator[tuple[str, Array]]:
    from safetensors import SafetensorError

    for file in files:
        if file.suffix == ".safetensors":
            try:
                yield from _read_safetensors(file)
            except SafetensorError as error:
                size = file.stat().st_size
                raise _broken(file, f"truncated or damaged ({error}; {size:,} bytes)") from None
        else:
            import torch

            try:
                state = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:
                reason = (str(error) or type(error).__name__).splitlines()[0][:160]
                raise _broken(
                    file,
                    f"not loadable as plain weights ({reason})",
                    "tensors only, no pickled code",
                ) from None
            flat = isinstance(state, dict) and all(
                isinstance(t, torch.Tensor) for t in state.values()
            )
            if not flat:
                raise _broken(file, "not a mapping of names to tensors", "a state_dict")
            for name, tensor in state.items():
                yield name, tensor.float().numpy()


def encoder_tensors(
    state: Mapping[str, Array], config: EncoderConfig, hf: Mapping[str, Any], folder: Path
) -> dict[str, Array]:
    """The encoder's tensors under our names, as families.py says."""
    family = FAMILIES[config.family]
    inside = any(name.startswith(family.prefix) for name in state)
    prefix = family.prefix if inside else ""

    def get(name: str, shape: tuple[int, ...]) -> Array:
        # Checkpoints converted from TensorFlow name the layer norm's parameters gamma and beta.
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        old = old.replace("LayerNorm.bias", "LayerNorm.beta")
        tensor = state.get(prefix + name, state.get(prefix + old))
        if tensor is None:
            raise _broken(folder, f"no tensor {prefix + name}", "every weight of the encoder")
        if tensor.shape != shape:
            raise _broken(folder, f"{prefix + name} is {list(tensor.shape)}", f"{list(shape)}")
        if not np.isfinite(tensor).all():
            raise _broken(folder, f"{prefix + name} holds NaN or infinity", "finite weights")
        return np.asarray(tensor, dtype=np.float32)

    h, f = config.hidden, config.ffn
    offset = family.offset(_pad(hf))
    positions = get("embeddings.position_embeddings.weight", (config.positions + offset, h))
    types = np.zeros((1, h), np.float32)
    if family.type_table:
        rows = config.types if family.types else int(hf.get("type_vocab_size", 2))
        types = get("embeddings.token_type_embeddings.weight", (rows, h))
    tensors = {
        "embeddings.word": get("embeddings.word_embeddings.weight", (config.vocab, h)),
        "embeddings.position": np.ascontiguousarray(positions[offset:]),
        "embeddings.type": types if family.types else np.repeat(types[:1], config.types, axis=0),
        "embeddings.ln.weight": get("embeddings.LayerNorm.weight", (h,)),
        "embeddings.ln.bias": get("embeddings.LayerNorm.bias", (h,)),
    }
    if family.buckets:
        count = int(hf.get(family.buckets, 32))
        table = get("encoder.relative_attention_bias.weight", (count, config.heads))
        tensors["position_bias"] = position_bias(table, config.positions)
    shapes = {"qkv": (h, h), "out": (h, h), "ffn_in": (f, h), "ffn_out": (h, f)}
    for layer in range(config.layers):
        for ours, theirs in family.layer.items():
            shape = shapes.get(ours, (h,))
            for part in ("weight", "bias"):
                wanted = shape if part == "weight" else shape[:1]
                names = [f"{family.layers}.{layer}.{name}.{part}" for name in theirs]
                stacked = [get(name, wanted) for name in names]
                tensors[f"layer.{layer}.{ours}.{part}"] = np.concatenate(stacked)
    return tensors
