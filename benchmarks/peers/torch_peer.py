"""transformers' BertModel in fp32 with sdpa attention, in inference mode."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from peers.padded import Arm, Call
from samp_kernels.interface import Array

PACKAGES = ("torch", "transformers")


def arms(folder: Path, threads: int) -> Iterator[Arm]:
    """`folder` is the checkpoint."""
    import transformers

    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.BertModel.from_pretrained(
        folder, add_pooling_layer=False, attn_implementation="sdpa", dtype=torch.float32
    ).eval()

    def bind(ids: Array, mask: Array, types: Array) -> Call:
        # Without padding a mask is only work.
        tensors = {"input_ids": torch.from_numpy(ids), "token_type_ids": torch.from_numpy(types)}
        if not mask.all():
            tensors["attention_mask"] = torch.from_numpy(mask)

        def call() -> Array:
            with torch.inference_mode():
                states: Array = model(**tensors).last_hidden_state.numpy()
                return states

        return call

    yield Arm("torch_fp32", "BertModel, sdpa", bind)
