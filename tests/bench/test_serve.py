"""What bench/serve.py makes of what it saw."""

import pytest
from serve import arrivals, joined, raised, verdict


def test_users_come_at_the_rate_that_was_asked_for_and_again_at_the_same_times():
    times = arrivals(5.0, 1000.0, 1)
    assert times == sorted(times) == arrivals(5.0, 1000.0, 1)
    assert len(times) == pytest.approx(5000, rel=0.05)
    assert times != arrivals(5.0, 1000.0, 2)
    assert 0 < times[0] < times[-1] < 1000.0


def block(first, steps=0, training=0.0):
    seen = [{"first": each, "whole": 2 * each, "counts": i > 0} for i, each in enumerate(first)]
    told = {"steps": steps, "training_seconds": training, "parts": {}, "more": 0.0, "alone": {}, "others": 0.0}
    return {"seconds": 10.0, "seen": seen, "failed": 0, **told}


def test_blocks_are_joined_without_the_users_that_the_block_before_may_have_met():
    row = joined([block([9.0, 0.1, 0.2], 1, 2.0), block([9.0, 0.3], 2, 1.0)], tokens=8)
    assert row["first_seconds"] == [0.1, 0.2, 0.3]
    assert (row["first"]["n"], row["first"]["p99"], row["whole"]["p99"]) == (3, 0.3, 0.6)
    assert (row["requests"], row["tokens_per_second"]) == (5, 2.0)  # everyone was served
    assert (row["steps_per_second"], row["training_seconds"]) == (0.15, 3.0)


def test_a_bound_is_held_where_the_99th_percentile_is_within_it():
    waits = [0.1 + 0.001 * i for i in range(101)]
    off = joined([block(waits)], 8)
    row = {"share": 0.2, "off": off, "on": joined([block([1.05 * each for each in waits], 1, 2.5)], 8)}
    told = verdict(row, 0.1)
    assert told["held"]
    assert not verdict(row, 0.04)["held"]
    assert told["raised_p99"]["by"] == pytest.approx(0.05, abs=1e-3)
    assert told["raised_p99"]["from"] < 0.05 < told["raised_p99"]["to"]
    assert (told["n"], told["training_share_of_time"], told["users_throughput"]) == (100, 0.25, 1.0)


def test_few_users_leave_a_wide_interval():
    few, many = ([0.1 + 0.1 * (i % 7) for i in range(n)] for n in (7, 700))
    width = [each["to"] - each["from"] for each in (raised(few, few, 0.5), raised(many, many, 0.5))]
    assert width[0] > 4 * width[1]
