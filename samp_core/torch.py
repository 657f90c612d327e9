"""A plan inside a PyTorch program: a transformers model whose encoder is ours.

    model = AutoModelForSequenceClassification.from_pretrained("my-checkpoint")
    fast = samp_core.torch.wrap(model, "model_repository/my-checkpoint/.../plan.json")
    tokens = tokenizer(["a fine film"], padding=True, return_tensors="pt")
    logits = fast(**tokens).logits
    fast.executed()["layer.0.qkv"]  # "int8"

Inference only. Padding is dropped before the encoder and put back behind it.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from samp_kernels.interface import Array, Batch, EncoderConfig, OutputKind, Session

from samp_core.checkpoint import checkpoint_sha256, encoder_config, encoder_tensors
from samp_core.encoder_files import planned_session
from samp_core.errors import SampError, UsageError
from samp_core.families import FAMILIES
from samp_core.plan import UNMEASURED, Plan, unmeasured
from samp_core.quantize import export_weights

_OUTPUTS = {
    "mpnet": "BaseModelOutputWithPooling",
    "distilbert": "BaseModelOutput",
}
_ANOTHER_OUTPUT = "BaseModelOutputWithPoolingAndCrossAttentions"
# What transformers passes along that changes nothing here.
_HARMLESS = ("return_dict", "use_cache")


def wrap(hf_model: Any, plan: Plan | Path | str, *, threads: int | None = None) -> PlannedModel:
    """A module with the calls and answers of `hf_model`, its encoder run under `plan`.

    hf_model: a transformers model of a family that we know, bare or with a head; it stays as it
    is, later changes of its weights are not seen. plan: a Plan, a plan.json, or a folder with one;
    with scales where it quantizes; one that no build has measured is warned of. Raises SampError
    as loading an encoder does.
    """
    chosen = plan if isinstance(plan, Plan) else _read_plan(Path(plan))
    if unmeasured(chosen):
        warnings.warn(f"this plan {UNMEASURED}", stacklevel=2)
    hf = hf_model.config.to_dict()
    where = Path(str(hf_model.config.name_or_path or type(hf_model).__name__))
    config = encoder_config(hf, where)
    found = checkpoint_sha256(where)
    if found is not None and chosen.model_sha256 != found:
        raise SampError(
            "plan_mismatch",
            f"a plan for the checkpoint {chosen.model_sha256[:12]}",
            f"one for {where} ({found[:12]})",
            f"plan again: samp build --model {where} --data ROWS",
        )
    state = {
        name: np.array(value.detach().to("cpu", torch.float32))  # a copy: theirs may change
        for name, value in hf_model.state_dict().items()
        if value.is_floating_point()
    }
    tensors = export_weights(encoder_tensors(state, config, hf, where), chosen)
    session = planned_session(config, tensors, chosen, threads)
    prefix = FAMILIES[config.family].prefix.rstrip(".")
    base = getattr(hf_model, prefix, hf_model)
    only_first = type(hf_model).__name__.endswith("ForSequenceClassification")
    encoder = _Encoder(session, config, base, only_first=only_first)
    if base is hf_model:
        return PlannedModel(encoder, encoder)
    # The same head over another encoder; the caller's model keeps its own.
    headed = copy.copy(hf_model)
    headed._modules = {
        name: encoder if name == prefix else copy.deepcopy(module)
        for name, module in hf_model._modules.items()
    }
    return PlannedModel(headed, encoder)


class PlannedModel(torch.nn.Module):
    """What `wrap` returns: called as the model that was wrapped, always in inference."""

    def __init__(self, model: Any, encoder: _Encoder) -> None:
        super().__init__()
        self.model = model
        self.config = encoder.hf_config
        self._encoder = [encoder]  # a list: it is a part of `model` already
        super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The answer of the wrapped model's forward, without gradients."""
        with torch.no_grad():
            return self.model(*args, **kwargs)

    def executed(self) -> dict[str, str]:
        """Site -> the precision of the kernel that ran it in the last call."""
        return self._encoder[0].session.executed()

    def train(self, mode: bool = True) -> PlannedModel:
        """Evaluation is the only mode. Raises UsageError for training."""
        if mode:
            raise UsageError(
                "inference_only",
                "training mode of a model that runs a plan",
                "evaluation: a plan has no gradients",
                "train the transformers model, then wrap it",
            )
        return super().train(False)


class _Encoder(torch.nn.Module):
    """The encoder of a transformers model, with its calls and its kind of answer."""

    def __init__(
        self, session: Session, config: EncoderConfig, base: Any, *, only_first: bool
    ) -> None:
        super().__init__()
        self.session = session
        self.pooler = copy.deepcopy(getattr(base, "pooler", None))
        self.hf_config = self.config = base.config
        self._config, self._only_first = config, only_first
        family = FAMILIES[config.family]
        pad = base.config.pad_token_id
        self._offset = family.offset(1 if pad is None else int(pad))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """ids, mask and types [b, L] -> last_hidden_state [b, L, H], zeros where the mask is 0."""
        from transformers import modeling_outputs

        given = [
            n for n, v in others.items() if n not in _HARMLESS and v is not None and v is not False
        ]
        if given or input_ids is None:
            raise _refused(
                ", ".join(given) or "no input_ids", "input_ids, attention_mask, token_type_ids"
            )
        ids = _host("input_ids", input_ids, tuple(input_ids.shape))
        mask = np.ones(ids.shape, dtype=bool)
        if attention_mask is not None:
            mask = _host("attention_mask", attention_mask, ids.shape) != 0
        types = np.zeros_like(ids)
        if token_type_ids is not None:
            types = _host("token_type_ids", token_type_ids, ids.shape)
        batch = self._packed(ids, mask, types)
        # A head over the first column reads nothing else.
        first = self._only_first and bool(mask[:, 0].all())
        output: OutputKind = "first" if first else "tokens"
        rows = self.session.run(batch, output=output)
        states = np.zeros((*ids.shape, rows.shape[1]), dtype=np.float32)
        if first:
            states[:, 0] = rows
        else:
            states[mask] = rows
        hidden = torch.from_numpy(states).to(input_ids.device)
        fields = {"last_hidden_state": hidden}
        if self.pooler is not None:
            fields["pooler_output"] = self.pooler(hidden)
        kind = getattr(modeling_outputs, _OUTPUTS.get(self._config.family, _ANOTHER_OUTPUT))
        made = kind(**fields)
        wanted = self.config.return_dict if return_dict is None else return_dict
        return made if wanted else made.to_tuple()

    def _packed(self, ids: Array, mask: Array, types: Array) -> Batch:
        """The rows without padding; each token has the position that transformers gives it."""
        lengths = mask.sum(axis=1)
        begins = mask.argmax(axis=1)
        columns = np.arange(ids.shape[1])
        run = (columns >= begins[:, None]) & (columns < (begins + lengths)[:, None])
        if ids.shape[0] == 0 or int(lengths.min()) < 1 or not np.array_equal(run, mask):
            raise _refused("an attention_mask with gaps, or a row without a token", "0 at the ends")
        positions = np.broadcast_to(columns, ids.shape)
        if self._offset:
            # These families count from the first token that is no padding.
            positions = positions - begins[:, None]
        top = int(positions[mask].max())
        if top >= self._config.positions:
            raise _refused(f"a text of {top + 1} tokens", f"at most {self._config.positions}")
        return Batch(
            ids[mask].astype(np.int32),
            types[mask].astype(np.int32),
            positions[mask].astype(np.int32),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
            int(lengths.max()),
        )


def _host(name: str, x: torch.Tensor, shape: tuple[int, ...]) -> Array:
    if x.ndim != 2 or tuple(x.shape) != shape:
        raise _refused(f"{name} {list(x.shape)}", f"[texts, tokens]: {list(shape)}")
    return np.asarray(x.detach().cpu().numpy())


def _refused(given: str, allowed: str) -> UsageError:
    return UsageError("wrapped_call", given, allowed, "call the transformers model for the rest")


def _read_plan(path: Path) -> Plan:
    file = path / "plan.json" if path.is_dir() else path
    try:
        return Plan.from_json(file.read_text(encoding="utf-8"), str(file))
    except OSError as error:
        raise UsageError(
            "no_plan", f"{file}: {error.strerror}", "a plan.json, or a folder that holds one",
            "name the plan of a build: current/models/encoder_<model>_<tier>/1",
        ) from None  # fmt: skip
