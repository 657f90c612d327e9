"""Triton's counters into mean milliseconds."""

from samp_client.server_times import Counters, read_counters, tier_times

# The same model as each protocol writes it; gRPC leaves zeros out.
GRPC = {
    "name": "head_m",
    "version": "1",
    "inference_stats": {
        "success": {"count": "4", "ns": "9000000"},
        "fail": {},
        "queue": {"count": "4", "ns": "2000000"},
        "compute_input": {"count": "4"},
        "compute_infer": {"count": "4", "ns": "5000000"},
        "compute_output": {"count": "4", "ns": "1000000"},
    },
}
HTTP = {
    "name": "head_m",
    "version": "1",
    "inference_stats": {
        "success": {"count": 4, "ns": 9000000},
        "fail": {"count": 0, "ns": 0},
        "queue": {"count": 4, "ns": 2000000},
        "compute_input": {"count": 4, "ns": 0},
        "compute_infer": {"count": 4, "ns": 5000000},
        "compute_output": {"count": 4, "ns": 1000000},
    },
}


def test_both_protocols_read_alike_and_versions_are_summed():
    assert read_counters([GRPC]) == read_counters([HTTP])
    assert read_counters([GRPC]) == {"head_m": Counters(4, 2_000_000, 6_000_000)}
    assert read_counters([GRPC, HTTP]) == {"head_m": Counters(8, 4_000_000, 12_000_000)}
    assert read_counters([{"name": "new", "inference_stats": {}}]) == {"new": Counters(0, 0, 0)}


def test_means_between_two_readings():
    before = {"tokenizer_m": Counters(10, 1_000_000, 2_000_000)}
    after = {
        "tokenizer_m": Counters(14, 3_000_000, 10_000_000),
        "encoder_m_fast": Counters(2, 1_000_000, 6_000_000),
        "other": Counters(99, 99, 99),
    }
    times = tier_times("fast", ["tokenizer_m", "encoder_m_fast"], before, after)
    assert [step.requests for step in times.steps] == [4, 2]
    assert times.steps[0].queue_ms == 0.5
    assert times.steps[0].compute_ms == 2.0
    assert times.queue_ms == 1.0
    assert times.compute_ms == 5.0


def test_no_requests_is_not_zero_milliseconds():
    counters = {"tokenizer_m": Counters(10, 1_000_000, 2_000_000)}
    times = tier_times("fast", ["tokenizer_m", "encoder_m_fast"], counters, counters)
    assert (times.queue_ms, times.compute_ms) == (None, None)


def test_a_model_that_was_reloaded_counts_from_zero():
    before = {"head_m": Counters(100, 100_000_000, 200_000_000)}
    after = {"head_m": Counters(2, 1_000_000, 4_000_000)}
    step = tier_times("fast", ["head_m"], before, after).steps[0]
    assert (step.requests, step.queue_ms, step.compute_ms) == (2, 0.5, 2.0)
