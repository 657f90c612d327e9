"""The sticky arm: interfaces.md pins it, so a router of another make must agree with these."""

from collections import Counter

import pytest
from samp_client.sticky import BUCKETS, bucket, sticky_arm

# From the published digests of SHA-256: e3b0c44298fc1c14... of "" and ba7816bf8f01cfea... of "abc".
PUBLISHED = {"": 0xE3B0C44298FC1C14 % 10_000, "abc": 0xBA7816BF8F01CFEA % 10_000}


@pytest.mark.parametrize("key", PUBLISHED)
def test_bucket_is_the_first_eight_bytes_of_the_published_digest(key):
    assert bucket(key) == PUBLISHED[key]
    assert bucket(key.encode()) == PUBLISHED[key]


@pytest.mark.parametrize(
    ("key", "place"),
    [("", 1652), ("abc", 74), ("user-0", 567), ("user-1", 2594), ("user-2", 8987)],
)
def test_pinned_vectors(key, place):
    assert bucket(key) == place
    assert sticky_arm(key, {"a": place, "b": BUCKETS - place}) == "b"
    assert sticky_arm(key, {"a": place + 1, "b": BUCKETS - place - 1}) == "a"


def test_shares_of_many_keys():
    weights = {"exact": 70, "balanced": 25, "fast": 5}
    counts = Counter(sticky_arm(f"key {index}", weights) for index in range(20_000))
    for arm, weight in weights.items():
        expected = 20_000 * weight / 100
        assert abs(counts[arm] - expected) < 4 * (expected * (1 - weight / 100)) ** 0.5


def test_the_scale_of_the_weights_does_not_matter():
    percent = {"a": 10, "b": 20, "c": 70}
    share = {"a": 0.1, "b": 0.2, "c": 0.7}
    keys = [str(index) for index in range(5_000)]
    assert [sticky_arm(key, percent) for key in keys] == [sticky_arm(key, share) for key in keys]


def test_growing_the_last_arm_moves_keys_only_into_it():
    before = {"control": 90, "candidate": 10}
    after = {"control": 70, "candidate": 30}
    for index in range(3_000):
        if sticky_arm(str(index), before) == "candidate":
            assert sticky_arm(str(index), after) == "candidate"


def test_an_arm_of_weight_zero_gets_nothing():
    weights = {"off": 0, "on": 1, "also off": 0.0}
    assert {sticky_arm(str(index), weights) for index in range(1_000)} == {"on"}


@pytest.mark.parametrize("weights", [{}, {"a": 0}, {"a": -1, "b": 2}, {"a": float("nan")}])
def test_weights_that_mean_nothing_are_refused(weights):
    with pytest.raises(ValueError, match="weight"):
        sticky_arm("key", weights)
