"""Small random checkpoints of every family, as transformers writes them, and their tokenizers."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
import transformers

FAMILIES = ("bert", "mpnet", "roberta", "xlm-roberta", "camembert", "distilbert")
WORDPIECE = ("bert", "mpnet", "distilbert")
LETTERS = string.ascii_lowercase
MPNET_WORDS = ("<s>", "<pad>", "</s>", "[UNK]", *LETTERS, *(f"##{c}" for c in LETTERS), "<mask>")
BERT_WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS))
UNIGRAMS = ("<s>", "<pad>", "</s>", "<unk>", "▁", *LETTERS, *(f"▁{c}" for c in LETTERS), "<mask>")
VOCABULARY = 64
LONGEST = 40
"""The most tokens of one text, in every family."""


def config(family: str, layers: int = 2, hidden: int = 48, heads: int = 3, **more: Any) -> Any:
    """Sizes alone; `more` are fields of transformers' configuration."""
    offset = 0 if family in ("bert", "distilbert") else 2
    sizes: dict[str, Any] = {
        "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "intermediate_size": 2 * hidden,
    }  # fmt: skip
    if family == "distilbert":
        sizes = {"n_layers": layers, "dim": hidden, "n_heads": heads, "hidden_dim": 2 * hidden}
    return transformers.AutoConfig.for_model(
        family, vocab_size=VOCABULARY, max_position_embeddings=LONGEST + offset,
        initializer_range=0.3, attn_implementation="eager", **sizes, **more,
    )  # fmt: skip


def write_family(folder: Path, family: str, auto: Any = None, seed: int = 0, **more: Any) -> Any:
    """Write a checkpoint whose every parameter matters; returns transformers' own model."""
    torch.manual_seed(seed)
    model = (auto or transformers.AutoModel).from_config(config(family, **more)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            lower = name.lower()
            if "norm" in lower and lower.endswith("weight"):
                parameter.normal_(1.0, 0.2)
            elif "relative" in lower:
                parameter.normal_(0.0, 2.0)
            else:
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    return model


def write_tokenizer(folder: Path, family: str) -> Any:
    """The family's own tokenizer over letters; returns transformers'."""
    if family == "mpnet":
        vocab = {word: i for i, word in enumerate(MPNET_WORDS)}
        tokenizer = transformers.MPNetTokenizer(vocab, model_max_length=LONGEST)
    elif family in WORDPIECE:
        vocab = {word: i for i, word in enumerate(BERT_WORDS)}
        tokenizer = transformers.BertTokenizer(vocab, model_max_length=LONGEST)
    else:
        scored = [(piece, -float(i % 7) - 1.0) for i, piece in enumerate(UNIGRAMS)]
        tokenizer = transformers.XLMRobertaTokenizer(scored, model_max_length=LONGEST)
    tokenizer.save_pretrained(folder)
    return tokenizer


def padded(model: Any, ids: list[Any]) -> Any:
    """transformers' hidden states of texts of different lengths, padded side by side."""
    pad = int(model.config.pad_token_id or 0)
    longest = max(map(len, ids))
    rows = torch.full((len(ids), longest), pad)
    mask = torch.zeros(len(ids), longest, dtype=torch.long)
    for i, row in enumerate(ids):
        rows[i, : len(row)] = torch.as_tensor(row)
        mask[i, : len(row)] = 1
    with torch.no_grad():
        return model(input_ids=rows, attention_mask=mask)
