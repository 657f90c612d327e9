"""Bad input on the served path: one clear error, for that request only, and serving goes on."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import alive, classify, infer, text_rows
from conftest import MAX_LENGTH, Served
from tritonclient.utils import InferenceServerException

from samp_core.errors import SampError
from samp_core.server import Server

GOOD = "a fine film"


def _fails(call: Callable[[], Any], pattern: str) -> None:
    with pytest.raises(InferenceServerException) as caught:
        call()
    message = str(caught.value.message())
    assert re.search(pattern, message), message
    assert "\n" not in message.strip()
    assert "Traceback" not in message


@pytest.fixture(autouse=True)
def _still_serving(served: Served) -> Any:
    yield
    for tier in served.tiers:
        assert alive(served.grpc, f"{served.model}_{tier}")
    assert served.server.poll() is None


@pytest.mark.parametrize(
    ("raw", "where"),
    [
        (b"\xff\xfe", "0xff at 0"),
        (b"fine \xe2\x82", "0xe2 at 5"),
        (b"\xed\xa0\x80", "0xed at 0"),
        (b"caf\xe9", "0xe9 at 3"),
    ],
)
def test_invalid_utf8(served: Served, raw: bytes, where: str) -> None:
    ensemble = f"{served.model}_fast"
    _fails(
        lambda: classify(served.grpc, ensemble, [GOOD, raw]),
        rf"TEXT row 1: byte {where} is not UTF-8; allowed: UTF-8",
    )


def test_only_the_bad_requests_of_a_busy_server_fail(served: Served) -> None:
    """Good and bad ones in flight together, so that they share batches."""
    ensemble = f"{served.model}_fast"
    expected = classify(served.grpc, ensemble, [GOOD])["SCORES"]
    texts: list[str | bytes] = [GOOD if i % 3 else b"\xc3\x28" for i in range(120)]

    def call(text: str | bytes) -> Any:
        try:
            return classify(served.grpc, ensemble, [text])["SCORES"]
        except InferenceServerException as error:
            return str(error.message())

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(call, texts))
    for text, answer in zip(texts, answers, strict=True):
        if text == GOOD:
            np.testing.assert_allclose(answer, expected, atol=1e-5)
        else:
            assert "is not UTF-8" in answer


def test_a_megabyte_of_text_is_truncated_and_says_so(served: Served) -> None:
    text = "a film of rare beauty and wit " * 35_000
    assert len(text) > 1_000_000
    ensemble = f"{served.model}_exact"
    long = classify(served.grpc, ensemble, [text, GOOD])
    assert long["TRUNCATED"][:, 0].tolist() == [True, False]
    prefix = classify(served.grpc, ensemble, [" ".join(text.split()[:MAX_LENGTH])])
    np.testing.assert_allclose(long["SCORES"][:1], prefix["SCORES"], atol=1e-5)


def test_odd_but_good_texts(served: Served) -> None:
    texts = ["", "\0", "a\0b", "é", "好电影", "\U0001f600", "\ufeffx", "[SEP] [CLS]", "\u202e"]
    answer = classify(served.grpc, f"{served.model}_exact", texts)
    assert np.allclose(answer["SCORES"].sum(axis=1), 1, atol=1e-5)
    assert not answer["TRUNCATED"].any()


@pytest.mark.parametrize(
    ("tensor", "pattern"),
    [
        (np.zeros((1, 1), np.int32), "TEXT.*(TYPE_STRING|BYTES)"),
        (text_rows(["a", "b"])[:, 0], r"unexpected shape.*TEXT|\[-1,1\]"),
        (text_rows(["a", "b"]).reshape(1, 2), r"unexpected shape.*TEXT|\[-1,1\]"),
        (text_rows([GOOD] * 65), "batch-size must be <= 64"),
    ],
    ids=["dtype", "no batch dimension", "two texts a row", "batch over the limit"],
)
def test_wrong_tensors(served: Served, tensor: Any, pattern: str) -> None:
    _fails(lambda: infer(served.grpc, f"{served.model}_fast", TEXT=tensor), pattern)


def test_the_largest_batch_is_served(served: Served) -> None:
    answer = classify(served.grpc, f"{served.model}_fast", served.texts[:64])
    assert answer["SCORES"].shape == (64, 2)


def test_unknown_tier(served: Served) -> None:
    _fails(
        lambda: classify(served.grpc, f"{served.model}_quickest", [GOOD]),
        f"unknown model.*'{served.model}_quickest'",
    )


def _encode(served: Served, ids: Any, types: Any, lengths: Any) -> Any:
    return infer(
        served.grpc,
        f"encoder_{served.model}_fast",
        IDS=np.array(ids, np.int32),
        TYPES=np.array(types, np.int32),
        LENGTHS=np.array(lengths, np.int32),
    )["FEATURE"]


@pytest.mark.parametrize(
    ("ids", "types", "lengths", "pattern"),
    [
        ([[101, 102]], [[0, 0]], [[0]], r"LENGTHS row 0: 0; allowed: 1 to 2"),
        ([[101, 102]], [[0, 0]], [[-1]], r"LENGTHS row 0: -1"),
        ([[101, 102]] * 2, [[0, 0]] * 2, [[2], [3]], r"LENGTHS row 1: 3; allowed: 1 to 2"),
        ([[101, 102]], [[0, 0]], [[2**31 - 1]], r"LENGTHS row 0: 2147483647"),
        ([[5] * 600], [[0] * 600], [[513]], r"LENGTHS row 0: 513; allowed: 1 to 512, the model's"),
        ([[101, 30522]], [[0, 0]], [[2]], r"IDS row 0, token 1: 30522; allowed: 0 to 30521"),
        ([[101, -1]], [[0, 0]], [[2]], r"IDS row 0, token 1: -1"),
        ([[-(2**31), 102]], [[0, 0]], [[2]], r"IDS row 0, token 0: -2147483648"),
        ([[101, 102]], [[0, 2]], [[2]], r"TYPES row 0, token 1: 2; allowed: 0 to 1"),
        ([[101, 102]], [[0, -1]], [[2]], r"TYPES row 0, token 1: -1"),
        ([[101, 102]], [[0, 0, 0]], [[2]], r"TYPES \[1, 3\]; allowed: the shape of IDS, \[1, 2\]"),
        ([[101, 102]] * 2, [[0, 0]] * 2, [[2]], r"LENGTHS|batch"),
    ],
)
def test_lies_told_straight_to_the_encoder(
    served: Served, ids: Any, types: Any, lengths: Any, pattern: str
) -> None:
    _fails(lambda: _encode(served, ids, types, lengths), pattern)


def test_padding_may_hold_anything(served: Served) -> None:
    clean = _encode(served, [[101, 2307, 102]], [[0, 0, 0]], [[3]])
    dirty = _encode(served, [[101, 2307, 102, -7, 10**9]], [[0, 0, 0, 9, -9]], [[3]])
    np.testing.assert_array_equal(clean, dirty)


def _weights(served: Served) -> Path:
    folder = (served.out / "current").resolve()
    return folder / "models" / f"encoder_{served.model}_exact" / "1" / "weights.safetensors"


@pytest.mark.parametrize("damage", ["flipped byte", "truncated"])
def test_damaged_weights_do_not_load_and_the_loaded_ones_stay(served: Served, damage: str) -> None:
    """90 MB, so that it is the model's own check that finds it, in its process."""
    path = _weights(served)
    good = path.read_bytes()
    ensemble = f"{served.model}_exact"
    before = classify(served.grpc, ensemble, list(served.texts[:5]))["SCORES"]
    try:
        if damage == "truncated":
            path.write_bytes(good[: len(good) // 2])
        else:
            middle = len(good) // 2
            path.write_bytes(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :])
        with pytest.raises(SampError) as caught:
            served.server.reload()
        message = str(caught.value)
        assert caught.value.code == "damaged_repository"
        assert f"model encoder_{served.model}_exact" in message
        assert "weights.safetensors: its SHA-256" in message
        assert "samp build" in message
        assert "\n" not in message
        after = classify(served.grpc, ensemble, list(served.texts[:5]))["SCORES"]
        np.testing.assert_allclose(after, before, atol=1e-5)
        with pytest.raises(SampError, match=r"encoder_film-reviews_exact: .*weights\.safetensors"):
            Server.start(served.out, tiers=["exact"])
    finally:
        path.write_bytes(good)
    served.server.reload()
