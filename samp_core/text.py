"""Text to token ids, the same in the builder and in the server. Imports no transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

from samp_core.errors import SampError
from samp_core.families import FAMILIES
from samp_core.rows import Text
from samp_core.windows import Windows

_TOKENIZER = "tokenizer.json"
_VOCABULARY = "vocab.txt"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_MODEL_CONFIG = "config.json"
_SERVED = "text.json"
_FILES = (_TOKENIZER, _VOCABULARY, _TOKENIZER_CONFIG, _MODEL_CONFIG, _SERVED)

_SPECIALS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
# Whose special tokens and pairs vocab.txt alone settles; "": config.json does not say.
_WORD_LISTS = ("", "bert", "distilbert")
# Vocabularies that transformers can convert into tokenizer.json.
_OTHERS = ("vocab.json", "merges.txt", "*.model", _VOCABULARY)
_FEWEST_TOKENS = 3
_NO_LIMIT = 512
_CHARACTERS_PER_TOKEN = 32


@dataclass(frozen=True)
class Encoding:
    """One text or pair: ids and types int32 [L]; truncated if tokens were dropped.

    offsets int32 [L, 2]: code points of the token's own text, end exclusive; words int32 [L]: the
    word of it that the token is a part of. -1 for [CLS] and [SEP]; None if not asked for.
    """

    ids: NDArray[np.int32]
    types: NDArray[np.int32]
    truncated: bool
    offsets: NDArray[np.int32] | None
    words: NDArray[np.int32] | None = None


class TextEncoder:
    """A checkpoint's tokenizer with truncation to max_length and without padding.

    A pair's longer text loses tokens first, as with transformers' longest_first. It is done here,
    not by the library, which keeps what it cuts off in every combination of a pair's pieces. With
    `windows` a text keeps the tokens of all its windows, only what lies beyond them is truncated.
    spaces: a word is what stands between white space, not what the tokenizer splits first.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        side: str = "right",
        windows: Windows | None = None,
        spaces: bool = False,
    ) -> None:
        tokenizer.no_padding()
        self.longest = max_length if windows is None else windows.tokens
        tokenizer.no_truncation()
        self.max_length = max_length
        self.windows = windows
        self.spaces = spaces
        self._side = side
        self._tokenizer = tokenizer
        # The whole file as text is slow where it holds 250,000 unigrams: only where it may matter.
        cuts = side == "right" and isinstance(tokenizer.model, WordPiece)
        self._boundary = _safe_boundary(json.loads(tokenizer.to_str())) if cuts else None

    @classmethod
    def load(cls, folder: str | Path, max_length: int | None = None) -> TextEncoder:
        """From tokenizer.json, or from vocab.txt as a BERT tokenizer.

        max_length counts [CLS] and [SEP]; the default is the one that `save` wrote, else the
        tokenizer's model_max_length, and in any case at most the model's position embeddings.
        """
        folder = Path(folder)
        config = _read_json(folder / _TOKENIZER_CONFIG)
        if (folder / _TOKENIZER).is_file():
            try:
                tokenizer = Tokenizer.from_file(str(folder / _TOKENIZER))
            except Exception as error:  # the library raises bare Exception
                raise _damaged(folder / _TOKENIZER, str(error)) from error
        elif (folder / _VOCABULARY).is_file() and _family(folder) in _WORD_LISTS:
            tokenizer = _from_vocabulary(folder / _VOCABULARY, config)
        else:
            raise _missing(folder)
        side = _read_json(folder / _SERVED).get("truncation_side")
        side = str(side or config.get("truncation_side", "right"))
        if side not in ("left", "right"):
            raise _damaged(folder / _TOKENIZER_CONFIG, f"truncation_side {side!r}")
        served = _read_json(folder / _SERVED)
        windows = Windows(**served["windows"]) if "windows" in served else None
        spaces = bool(served.get("spaces", False))
        return cls(tokenizer, _length(folder, config, max_length), side, windows, spaces)

    def with_windows(self, stride: int | None, most: int, spaces: bool = False) -> TextEncoder:
        """The same tokenizer for texts longer than max_length; stride None: a quarter."""
        if self._tokenizer.num_special_tokens_to_add(False) != 2:
            raise SampError(
                "windows", "a tokenizer without one special token at each end", "[CLS] text [SEP]",
                "choose another checkpoint",
            )  # fmt: skip
        shared = (self.max_length - 2) // 4 if stride is None else stride
        windows = Windows(self.max_length, shared, most)
        return TextEncoder(self._tokenizer, self.max_length, self._side, windows, spaces)

    def encode(self, texts: Sequence[Text], *, offsets: bool = True) -> list[Encoding]:
        """Token ids of every text; without offsets and words it takes about half the time."""
        whole: list[Any] = [None] * len(texts)
        short: list[int] = []
        limit = _CHARACTERS_PER_TOKEN * self.longest
        for index, text in enumerate(texts):
            for part in (text,) if isinstance(text, str) else text:
                _check_text(index, part)
            if self._boundary is not None and isinstance(text, str) and len(text) > limit:
                whole[index] = self._encode_long(text, limit, offsets)
            else:
                short.append(index)
        for index, encoded in zip(
            short, self._encode_all([texts[i] for i in short], offsets), strict=True
        ):
            whole[index] = encoded
        encodings = [self._encoding(encoded, offsets) for encoded in whole]
        if offsets and self.spaces:
            return [_between_spaces(e, str(t)) for e, t in zip(encodings, texts, strict=True)]
        return encodings

    def save(self, folder: str | Path) -> list[Path]:
        """Write into a folder all that `load` needs there; the paths written."""
        folder = Path(folder)
        tokenizer, served = folder / _TOKENIZER, folder / _SERVED
        tokenizer.write_text(self._tokenizer.to_str(), encoding="utf-8")
        limits: dict[str, Any] = {"max_length": self.max_length, "truncation_side": self._side}
        if self.windows is not None:
            limits["windows"] = asdict(self.windows)
        if self.spaces:
            limits["spaces"] = True
        served.write_text(json.dumps(limits) + "\n", encoding="utf-8")
        return [tokenizer, served]

    @staticmethod
    def files(folder: str | Path) -> list[Path]:
        """The files of a folder that `load` reads: the tokenizer's content, for hashing."""
        return [path for name in _FILES if (path := Path(folder) / name).is_file()]

    def _encode_all(self, texts: list[Text], offsets: bool) -> list[Any]:
        encode = self._tokenizer.encode_batch if offsets else self._tokenizer.encode_batch_fast
        result: list[Any] = encode(texts)
        return result

    def _encode_long(self, text: str, limit: int, offsets: bool) -> Any:
        """Encode a prefix only: when it overflows, the whole text gives the same first tokens."""
        assert self._boundary is not None
        while limit < len(text):
            cut = self._boundary.search(text, limit)
            if cut is None:
                break
            encoded = self._encode_all([text[: cut.start()]], offsets)[0]
            if len(encoded) > self.longest:
                return encoded
            limit = 4 * cut.start()
        return self._encode_all([text], offsets)[0]

    def _encoding(self, encoded: Any, offsets: bool) -> Encoding:
        keep = self._kept(encoded)
        spans = words = None
        if offsets:
            spans = np.array(encoded.offsets, dtype=np.int32).reshape(-1, 2)
            spans[np.array(encoded.special_tokens_mask, dtype=bool)] = -1
            words = np.array([-1 if w is None else w for w in encoded.word_ids], dtype=np.int32)
            spans, words = spans[keep], words[keep]
        return Encoding(
            np.array(encoded.ids, dtype=np.int32)[keep],
            np.array(encoded.type_ids, dtype=np.int32)[keep],
            len(encoded) > self.longest,
            spans,
            words,
        )

    def _kept(self, encoded: Any) -> Any:
        """The tokens that stay, as an index: all special ones, of each text its share."""
        if len(encoded) <= self.longest:
            return slice(None)
        whose = np.array([-1 if text is None else text for text in encoded.sequence_ids])
        keep = whose < 0
        places = [np.flatnonzero(whose == text) for text in (0, 1)]
        room = max(0, self.longest - int(keep.sum()))
        shares = _shares(len(places[0]), len(places[1]), room)
        for mine, count in zip(places, shares, strict=True):
            keep[mine[:count] if self._side == "right" else mine[len(mine) - count :]] = True
        return keep


def _shares(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens two texts keep of `room`: the longer loses until both are equal."""
    if first + second <= room:
        return first, second
    less = min(first, second, room // 2)
    return (room - less, less) if first > second else (less, room - less)


def _between_spaces(encoding: Encoding, text: str) -> Encoding:
    """The same tokens with the words that white space separates."""
    assert encoding.offsets is not None
    starts = np.array([match.start() for match in re.finditer(r"\S+", text)], dtype=np.int32)
    places = encoding.offsets[:, 0]
    words = np.searchsorted(starts, places, side="right").astype(np.int32) - 1
    return replace(encoding, words=np.where(places < 0, np.int32(-1), words))


def _safe_boundary(spec: dict[str, Any]) -> re.Pattern[str] | None:
    """Where WordPiece's texts may be cut so that the tokens before stay the same; None: nowhere.

    BERT's normalizer and pre-tokenizer work word by word, and no word spans white space or a CJK
    ideograph, which they isolate. An added token could, so that it must be free of both.
    """
    normalizer = spec.get("normalizer") or {}
    if (
        normalizer.get("type") != "BertNormalizer"
        or (spec.get("pre_tokenizer") or {}).get("type") != "BertPreTokenizer"
    ):
        return None
    ideographs = "\u4e00-\u9fff" if normalizer.get("handle_chinese_chars") else ""
    boundary = re.compile(rf"[ \t\r\n{ideographs}]")
    for token in spec.get("added_tokens") or []:
        if any(token.get(flag) for flag in ("lstrip", "rstrip", "single_word", "normalized")):
            return None
        if boundary.search(token["content"]):
            return None
    return boundary


def _from_vocabulary(path: Path, config: dict[str, Any]) -> Any:
    """BERT's WordPiece tokenizer from its list of tokens, with transformers' defaults."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise _damaged(path, "not UTF-8") from error
    vocabulary = {line.rstrip("\r"): index for index, line in enumerate(lines) if line}
    named = {role: _content(config.get(role), usual) for role, usual in _SPECIALS.items()}
    for role in ("unk_token", "cls_token", "sep_token"):
        if named[role] not in vocabulary:
            raise _damaged(path, f"{named[role]} is not in it")
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token=named["unk_token"]))
    tokenizer.normalizer = BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = BertPreTokenizer()
    cls, sep = named["cls_token"], named["sep_token"]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(cls, vocabulary[cls]), (sep, vocabulary[sep])],
    )
    known = [token for token in named.values() if token in vocabulary]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in known])
    return tokenizer


def _family(folder: Path) -> str:
    return str(_read_json(folder / _MODEL_CONFIG).get("model_type") or "")


def _missing(folder: Path) -> SampError:
    """No tokenizer.json, and nothing that says all that one says: what there is, what to do."""
    found = [path.name for pattern in _OTHERS for path in sorted(folder.glob(pattern))]
    given = f"only {', '.join(found)}" if found else "no tokenizer"
    given += f" of {_family(folder)}" if found and _family(folder) else ""
    return SampError(
        "tokenizer_missing",
        f"{folder}: {given}",
        f"{_TOKENIZER}, or BERT's {_VOCABULARY}",
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) in transformers writes it"
        if found
        else "save the tokenizer into the checkpoint's folder",
    )


def _length(folder: Path, config: dict[str, Any], wanted: int | None) -> int:
    model = _read_json(folder / _MODEL_CONFIG)
    positions = int(model.get("max_position_embeddings") or 10**30)
    family = FAMILIES.get(str(model.get("model_type")))
    if family is not None:
        pad = model.get("pad_token_id")
        positions -= family.offset(1 if pad is None else int(pad))
    if wanted is None:
        wanted = _read_json(folder / _SERVED).get("max_length")
    if wanted is None:
        usual = min(int(config.get("model_max_length") or 10**30), positions)
        return usual if usual < 10**9 else _NO_LIMIT
    if not _FEWEST_TOKENS <= wanted <= positions:
        raise SampError(
            "max_length",
            f"max_length {wanted}",
            f"{_FEWEST_TOKENS} to {positions}" if positions < 10**9 else f"{_FEWEST_TOKENS} or up",
            "choose a length within the model's position embeddings",
        )
    return wanted


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(value, dict):
        raise _damaged(path, "not a JSON object")
    return value


def _content(token: Any, usual: str) -> str:
    """A special token's text: tokenizer_config.json has it bare or as an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else usual


def _check_text(index: int, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SampError(
            "text_encoding",
            f"text {index} has an unpaired surrogate at character {error.start}",
            "UTF-8",
            "replace the broken character",
        ) from error


def _damaged(path: Path, why: str) -> SampError:
    return SampError(
        "tokenizer_damaged", f"{path}: {why}", "", "save the tokenizer into the folder again"
    )
