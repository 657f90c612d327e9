"""Folders without a tokenizer.json: what is refused, and what to do about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from samp_core.errors import SampError
from samp_core.text import TextEncoder


@pytest.mark.parametrize(
    "files", [("sentencepiece.bpe.model",), ("vocab.json", "merges.txt"), ("spiece.model",)]
)
def test_other_vocabularies_alone_are_one_clear_error(
    files: tuple[str, ...], tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(
        SampError, match=rf"tokenizer_missing: .*{files[0]}.*allowed: tokenizer\.js"
    ):
        TextEncoder.load(tmp_path)


def test_a_word_list_of_another_family_is_refused(tmp_path: Path) -> None:
    """MPNet's pairs have two separators, which vocab.txt does not say."""
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    TextEncoder.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mpnet"}')
    with pytest.raises(SampError, match=r"tokenizer_missing: .*vocab\.txt of mpnet; allowed: tok"):
        TextEncoder.load(tmp_path)
