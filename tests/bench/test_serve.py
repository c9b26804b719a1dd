"""What bench/serve.py makes of what it saw."""

import pytest
from serve import arrivals, verdicts, waits


def test_users_come_at_the_rate_that_was_asked_for_and_again_at_the_same_times():
    times = arrivals(5.0, 1000.0, 1)
    assert times == sorted(times) == arrivals(5.0, 1000.0, 1)
    assert len(times) == pytest.approx(5000, rel=0.05)
    assert times != arrivals(5.0, 1000.0, 2)
    assert 0 < times[0] < times[-1] < 1000.0


def row(share, on, p99, warm_up=False):
    first = {"n": 50, "p50": 0.1, "p90": 0.15, "p99": p99}
    throughput = {"tokens_per_second": 9.0 if on else 10.0, "steps_per_second": 0.5 if on else 0.0}
    return {"share": share, "training_on": on, "warm_up": warm_up, "first": first, **throughput}


def test_a_bound_is_held_where_the_99th_percentile_is_within_it():
    rows = [row(0.2, True, 9.0, warm_up=True), row(0.2, False, 0.2), row(0.2, True, 0.21), row(0.4, True, 0.5)]
    (first,) = verdicts(rows, 0.1)
    assert (first["share"], first["held"], first["n"]) == (0.2, True, 50)
    assert first["raised_p99"] == pytest.approx(0.05)
    assert (first["steps_per_second"], first["users_throughput"]) == (0.5, 0.9)
    rows.append(row(0.4, False, 0.4))
    assert [each["held"] for each in verdicts(rows, 0.1)] == [True, False]
    empty = row(0.7, False, 1) | {"first": waits([])}
    assert verdicts([empty, row(0.7, True, 1)], 0.1) == []
