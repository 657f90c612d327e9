"""What a load test sends, and where: tiers by weight, texts, addresses."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from samp_client import BadRequest, BatchTooLarge, Client, ClientError, Tls, connect
from samp_client.records import Row
from samp_client.transport import DEFAULT_PORTS, ProtocolName

_TIER = re.compile(r"[a-z0-9-]+")

# Sent where no file is given, so that a first test needs nothing but an address.
SAMPLE_TEXTS = (
    "A fine film.",
    "Two hours that feel like four, and none of them are spent with anyone worth knowing.",
    "The cast is better than the script deserves, and the last half hour redeems the rest.",
    "Dull.",
    "An honest, funny and quietly devastating piece of work, beautifully shot and never hurried.",
    "It has its moments, but they are few and far between.",
    "The director trusts the audience to keep up; the audience, for once, is glad to.",
    "Loud, long, and proud of both.",
)


def parse_mix(text: str) -> dict[str, float]:
    """Weights by tier from "fast" or "fast=3,exact=1". BadRequest for anything else."""
    allowed = "tier, or tier=weight,tier=weight with weights above 0"
    mix: dict[str, float] = {}
    for part in text.split(","):
        tier, _, weight = (piece.strip() for piece in part.partition("="))
        try:
            share = float(weight) if "=" in part else 1.0
        except ValueError:
            share = math.nan
        if not (_TIER.fullmatch(tier) and math.isfinite(share) and share > 0):
            raise BadRequest(f"tiers {text!r}", allowed, "correct it")
        if tier in mix:
            raise BadRequest(f"tiers {text!r} name {tier} twice", allowed, "give each tier once")
        mix[tier] = share
    return mix


def format_mix(mix: Mapping[str, float]) -> str:
    """The text that `parse_mix` reads."""
    return ",".join(f"{tier}={weight!r}" for tier, weight in mix.items())


def read_texts(path: str | None) -> tuple[Row, ...]:
    """Texts of a .jsonl file ({"text": ...} per line, pairs with "text_pair" too) or of a plain
    file, one per line.

    None gives a few built-in sentences. BadRequest names the file and line.
    """
    if not path:
        return SAMPLE_TEXTS
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"{path}: {error}", "a UTF-8 text file", "check the path") from None
    texts: list[Row] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            texts.append(_json_text(path, number, line) if path.endswith(".jsonl") else line)
    if not texts:
        raise BadRequest(f"{path} holds no text", "one text per line", "give a file with texts")
    return tuple(texts)


def read_lengths(path: str) -> dict[int, float]:
    """Share by words of a text, from lines such as `32 0.3` (words, weight; # begins a remark)."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"{path}: {error}", "a text file", "check the path") from None
    found: dict[int, float] = {}
    for number, line in enumerate(lines, 1):
        parts = line.partition("#")[0].replace(",", " ").split()
        if not parts:
            continue
        try:
            words, weight = int(parts[0]), float(parts[1])
        except (ValueError, IndexError):
            words, weight = 0, math.nan
        if not (words > 0 and math.isfinite(weight) and weight > 0 and len(parts) == 2):
            raise BadRequest(f"{path}:{number}: {line!r}", "words and a weight", "write: 32 0.3")
        found[words] = found.get(words, 0.0) + weight
    if not found:
        raise BadRequest(f"{path} holds no length", "lines such as: 32 0.3", "write some")
    return found


def with_lengths(
    texts: Sequence[Row], lengths: Mapping[int, float], count: int = 1000, seed: int = 0
) -> tuple[str, ...]:
    """`count` texts whose numbers of words are drawn from `lengths`: the words of the given texts,
    one after another, cut there. BadRequest for pairs.
    """
    if any(isinstance(row, tuple) for row in texts):
        raise BadRequest("lengths for pairs", "single texts", "leave out --lengths")
    plain = (row.decode() if isinstance(row, bytes) else str(row) for row in texts)
    words = [word for text in plain for word in text.split()]
    if not words:
        raise BadRequest("texts without a word", "words to make texts of", "give other texts")
    draw = random.Random(seed)
    start, made = 0, []
    for wanted in draw.choices(list(lengths), list(lengths.values()), k=count):
        made.append(" ".join(words[(start + i) % len(words)] for i in range(wanted)))
        start += wanted
    return tuple(made)


def fit(texts: Sequence[Row], pairs: bool) -> list[Row]:
    """Rows as a tier takes them. Where it takes pairs, each of the built-in sentences is asked
    with the next one; other texts without a second one are a BadRequest.
    """
    if not pairs:
        return [row if isinstance(row, (str, bytes)) else row[0] for row in texts]
    if tuple(texts) == SAMPLE_TEXTS:
        return list(zip(SAMPLE_TEXTS, (*SAMPLE_TEXTS[1:], SAMPLE_TEXTS[0]), strict=True))
    if any(isinstance(row, (str, bytes)) for row in texts):
        raise BadRequest("texts without a pair", "rows of text and text_pair", "give a .jsonl file")
    return list(texts)


def find_addresses(
    host: str | None,
    grpc_host: str | None,
    http_host: str | None,
    *,
    tls: Tls | None = None,
    headers: Mapping[str, str] | None = None,
) -> dict[ProtocolName, str]:
    """The address of each protocol that the test can use.

    grpc_host and http_host name one protocol each. host alone is gRPC's with TLS, which HTTP has
    not; else it is asked which of the two it speaks when it has a port, and stands for both of
    Triton's usual ports when it has none.
    """
    found: dict[ProtocolName, str] = {}
    if grpc_host:
        found["grpc"] = grpc_host
    if http_host:
        found["http"] = http_host
    if host:
        bare = host.partition("://")[2] if "://" in host else host
        bare = bare.rstrip("/")
        if tls is not None:
            found.setdefault("grpc", bare)
        elif re.search(r":\d+$", bare):
            protocol: ProtocolName = "http" if _speaks_http(bare, headers) else "grpc"
            found.setdefault(protocol, bare)
        else:
            found.setdefault("grpc", f"{bare}:{DEFAULT_PORTS['grpc']}")
            found.setdefault("http", f"{bare}:{DEFAULT_PORTS['http']}")
    if not found:
        raise BadRequest(
            "no address", "--host, --grpc-host or --http-host", "name the server as host:port"
        )
    return found


def check_tiers(client: Client, mix: Mapping[str, float], rows: int) -> None:
    """UnknownTier if the server lacks a tier, BatchTooLarge if one takes fewer rows a request."""
    for tier in mix:
        most = client.describe(tier).max_rows
        if rows > most:
            raise BatchTooLarge(f"{rows} rows in a request", f"{tier} takes {most}", "lower rows")


def _json_text(path: str, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadRequest(f"{path}:{number}: {error}", "JSON", "correct the line") from None
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise BadRequest(
            f"{path}:{number} has no string `text`", '{"text": "..."}', "correct the line"
        )
    pair = row.get("text_pair")
    return (text, pair) if isinstance(pair, str) else text


def _speaks_http(address: str, headers: Mapping[str, str] | None) -> bool:
    try:
        with connect(address, "http", timeout_s=5.0, headers=headers) as client:
            client.statistics()
    except ClientError:
        return False
    return True
