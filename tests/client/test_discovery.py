"""Reading a server's own description: index, ensemble, head, addresses."""

import pytest
from samp_client import connect
from samp_client.discovery import choose_model, read_labels, read_tier, tiers_by_model
from samp_client.errors import BadRequest, UnknownModel
from samp_client.transport import parse_address


def ready(*names):
    return [{"name": name, "version": "1", "state": "READY"} for name in names]


PARTS = ("tokenizer_reviews", "head_reviews", "encoder_reviews_fast", "encoder_reviews_exact")


def test_tiers_are_the_ensembles_beside_their_parts():
    index = ready(*PARTS, "reviews_fast", "reviews_exact", "other_thing", "plain")
    assert tiers_by_model(index) == {"reviews": ("exact", "fast")}


def test_what_is_not_loaded_is_no_tier():
    index = [*ready(*PARTS, "reviews_fast"), {"name": "reviews_exact", "state": "UNAVAILABLE"}]
    index.append({"name": "reviews_high"})  # explicit mode lists what was never loaded
    assert tiers_by_model(index) == {"reviews": ("fast",)}


def test_two_models_on_one_server():
    index = ready(*PARTS, "reviews_fast", "tokenizer_news-2", "head_news-2", "news-2_balanced")
    assert tiers_by_model(index) == {"news-2": ("balanced",), "reviews": ("fast",)}


def test_a_model_may_be_named_like_a_part():
    index = ready("tokenizer_head", "head_head", "encoder_head_fast", "head_fast")
    assert tiers_by_model(index) == {"head": ("fast",)}


def test_choosing_the_model():
    served = {"news": ("fast",), "reviews": ("fast",)}
    assert choose_model("news", served, "here") == "news"
    assert choose_model(None, {"news": ("fast",)}, "here") == "news"
    with pytest.raises(BadRequest, match="allowed: news, reviews; give model="):
        choose_model(None, served, "here")
    with pytest.raises(UnknownModel, match="'other'; allowed: news, reviews"):
        choose_model("other", served, "here")
    with pytest.raises(UnknownModel, match="serves no SAMP model"):
        choose_model(None, {}, "here")


def ensemble(outputs, inputs=("TEXT",)):
    return {
        "name": "reviews_fast",
        "max_batch_size": 32,
        "input": [{"name": name} for name in inputs],
        "output": [{"name": name} for name in outputs],
        "ensemble_scheduling": {
            "step": [{"model_name": "tokenizer_reviews"}, {"model_name": "encoder_reviews_fast"}]
        },
    }


def test_a_tier_is_read_from_its_ensemble():
    info = read_tier("fast", ensemble(["LABEL", "SCORE", "SCORES", "TRUNCATED"]))
    assert (info.tier, info.ensemble, info.max_rows) == ("fast", "reviews_fast", 32)
    assert info.steps == ("tokenizer_reviews", "encoder_reviews_fast")


def test_a_tiers_promise_is_read_where_it_has_one():
    config = ensemble(["LABEL", "SCORE", "SCORES", "TRUNCATED"])
    assert read_tier("fast", config).promise is None
    config["parameters"] = {"promise_points": {"string_value": "0.5"}}
    assert read_tier("fast", config).promise == 0.5


@pytest.mark.parametrize(
    "config",
    [
        ensemble(["PIXELS", "TRUNCATED"]),
        ensemble(["LABEL", "SCORE", "SCORES"]),
        ensemble(["LABEL", "SCORE", "SCORES", "TRUNCATED"], ("TEXT", "IMAGE")),
    ],
)
def test_another_task_is_said_and_not_guessed(config):
    with pytest.raises(BadRequest, match=r"reviews_fast takes TEXT"):
        read_tier("fast", config)


def test_labels_are_the_heads_own():
    config = {"parameters": {"labels": {"string_value": '["rotten", "fresh"]'}}}
    assert read_labels(config) == ("rotten", "fresh")
    assert read_labels({}) == ()


@pytest.mark.parametrize(
    ("url", "protocol", "address"),
    [
        ("127.0.0.1:9001", "grpc", "127.0.0.1:9001"),
        ("triton", "grpc", "triton:8001"),
        ("triton", "http", "triton:8000"),
        ("http://triton:80/", "http", "triton:80"),
        ("grpc://triton", "grpc", "triton:8001"),
        ("[::1]:9001", "grpc", "[::1]:9001"),
    ],
)
def test_addresses(url, protocol, address):
    assert parse_address(url, protocol) == address


@pytest.mark.parametrize(
    "url", ["", "https://triton:1", "a:b", "a:0", "a:70000", "a:1/path", "a b:1", "::1"]
)
def test_addresses_that_cannot_be(url):
    with pytest.raises(BadRequest, match="host:port"):
        parse_address(url, "grpc")


@pytest.mark.parametrize(
    "arguments",
    [
        {"protocol": "rest"},
        {"timeout_s": 0},
        {"timeout_s": -1.0},
        {"timeout_s": float("nan")},
    ],
)
def test_connect_checks_what_it_is_given(arguments):
    with pytest.raises(BadRequest):
        connect("127.0.0.1:8001", **arguments)
