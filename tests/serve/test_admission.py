"""Users first: on a clock that the test moves."""

import os
import random
import signal
import threading

import pytest

from mezo.serve.admission import AIM, CYCLE, EVERY, FEW, LATEST, PART, TAIL, WINDOW, Admission, Waits, percentile
from mezo.serve.signals import pausing


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self):
        self.time = WINDOW  # not in a window in which training is held back

    def __call__(self):
        return self.time


def admission(cost, alone=()):
    clock = Clock()
    made = Admission(cost, clock)
    made.waits[True].alone.extend(alone)
    return made, clock


def sizes(made, clock, n, seconds):
    """Lengths of the parts that n requests are divided into, each request of which takes so long."""
    found = []
    for part in made.parts(n):
        found.append(part.stop - part.start)
        clock.time += seconds * found[-1]
    return found


def test_parts_grow_to_the_limit_and_hold_every_request_once():
    made, clock = admission(0.1)
    found = sizes(made, clock, 100, PART / 10.5)
    assert sum(found) == 100
    assert found[:5] == [1, 2, 4, 8, 8]
    assert max(found) == 8
    slices = list(made.parts(7))
    assert [i for part in slices for i in range(part.start, part.stop)] == list(range(7))


@pytest.mark.parametrize(("base", "each"), [(0.06, 0.0005), (0.001, 0.05)], ids=["a batch is cheaper", "none is"])
def test_parts_are_as_large_as_gets_most_done_beside_users(base, each):
    """A larger part rests longer, and does more where its requests share most of its time."""
    made, clock = admission(0.2, alone=[0.05 + 0.001 * i for i in range(50)])
    made._left = clock.time
    sizes_seen = []
    for _ in range(20):
        sizes_seen.append(made._planned(made._paces[""]))
        made._paces[""].see(sizes_seen[-1], base + each * sizes_seen[-1])
    took = {2**k: base + each * 2**k for k in range(9)}
    fitting = {n: seconds for n, seconds in took.items() if n == 1 or seconds <= min(PART, CYCLE * made.share(seconds))}
    done = {n: n * made.share(seconds) / seconds for n, seconds in fitting.items()}
    assert sizes_seen[0] == 1
    assert done[sizes_seen[-1]] >= 0.95 * max(done.values())
    assert (sizes_seen[-1] >= 8) == (each < 0.01)
    assert made.limit == pytest.approx(took[sizes_seen[-1]])


def test_nothing_begins_while_a_stream_waits_for_its_first_token():
    made, _ = admission(10.0)
    with made.user(streamed=True) as request:
        assert not made._room()
        request.saw()
        made._credit = 1.0
        assert made._room()
    assert made._room()


def test_while_users_are_answered_training_gets_its_share_of_the_time():
    made, clock = admission(0.1, alone=[100.0] * FEW)  # a limit of PART
    clock.time = EVERY * WINDOW + WINDOW  # nor is this a window in which it is held back
    with made.user(streamed=False):
        assert not made._room()
        clock.time += 1.0
        made._account()
        assert made._room()  # 0.1 s of credit
        sizes(made, clock, 1, 0.25)
        assert not made._room()
        clock.time += 1.0
        made._account()
        assert not made._room()
        clock.time += 1.0
        made._account()
        assert made._room()
    assert made.seconds["users"] == pytest.approx(3.25)


def test_without_a_cost_nothing_begins_while_anybody_is_answered():
    made, clock = admission(0.0)
    with made.user(streamed=False):
        clock.time += 100.0
        made._account()
        assert not made._room()


def test_who_finds_a_part_running_may_be_late_as_seldom_as_the_bound_allows():
    """The share, against users drawn at random."""
    rng = random.Random(0)
    waits = Waits(streamed=True)
    waits.alone.extend(rng.gammavariate(8, 0.01) for _ in range(LATEST))
    bound = (1 + 0.1 * AIM) * percentile(waits.alone, 0.99)
    shares = [waits.share(took, 0.1) for took in (0.02, 0.05, 0.1, 0.3)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.1
    for took, share in zip((0.05, 0.1, 0.3), shares[1:], strict=True):
        late = [
            rng.choice(waits.alone) + (rng.random() * took if rng.random() < share else 0.0) > bound
            for _ in range(100_000)
        ]
        assert sum(late) / len(late) == pytest.approx(TAIL, rel=0.12)


def test_what_a_part_costs_beyond_its_end_makes_the_share_smaller():
    """As where a batch that is done has to be answered before the next one begins."""
    made, clock = admission(0.1, alone=[0.1] * FEW)
    waits, before = made.waits[True], made.share(0.03)
    assert waits.more() == 0.0
    for number in range(1, FEW + 1):
        clock.time = WINDOW * (1 + EVERY * number)  # the part before has been rested after
        with made.part("scores"):
            clock.time += 0.01
            user = made.user(streamed=True)
            request = user.__enter__()
            clock.time += 0.02
        clock.time += 0.108  # from the part's end
        request.saw()
        user.__exit__(None, None, None)
    assert waits.more() == pytest.approx(0.008)
    late = 1 - (0.1 * (1 + 0.2 * AIM) - 0.1 - 0.008) / 0.03
    assert made.share(0.03) < before
    assert waits.share(0.03, 0.2) == pytest.approx(TAIL / late)
    assert made.row()["seconds_more_after_a_part"]["first_token"] == pytest.approx(0.008)


def test_who_found_no_part_running_says_nothing_of_parts():
    made, clock = admission(0.1, alone=[0.1] * FEW)
    with made.part("scores"):
        clock.time += 0.01
    for _ in range(FEW):
        with made.user(streamed=True):
            clock.time += 0.5
    assert not made.waits[True].met


def test_parts_that_keep_everybody_within_the_bound_may_always_run():
    waits = Waits(streamed=True)
    assert waits.share(1.0, 0.1) == 1.0, "no waits are known"
    waits.alone.extend([0.2] * FEW)
    assert waits.share(0.2 * 0.1 * AIM - 0.001, 0.1) == 1.0


def test_training_rests_where_one_request_is_longer_than_the_bound():
    made, clock = admission(0.1, alone=[0.2] * FEW)
    made.waits[False].alone.extend([0.2] * FEW)
    clock.time = 2 * EVERY * WINDOW + WINDOW
    with made.user(streamed=True):
        pass
    sizes(made, clock, 1, 0.05)
    share = TAIL / (1 - 0.2 * 0.1 * AIM / 0.05)  # of users find it running, and one in a hundred too much of it left
    rest = 0.05 * (1 / share - 1)
    clock.time += rest - 0.01
    assert not made._room() or made._held_back()
    clock.time += 0.02
    assert made._room() or made._held_back()


def test_windows_without_training_come_while_there_are_users_alone():
    made, clock = admission(0.1)
    held = lambda: [made._held_back() for clock.time in [WINDOW * (i + 0.5) for i in range(2 * EVERY)]]  # noqa: E731
    assert not any(held())
    clock.time = 0.0
    with made.user(streamed=True):
        assert held() == [i % 2 == 0 for i in range(2 * EVERY)]  # few waits are known
        made.waits[True].alone.extend([0.1] * FEW)
        assert held() == [i % EVERY == 0 for i in range(2 * EVERY)]


def test_a_bound_that_is_broken_makes_the_share_smaller_and_larger_again():
    made, _ = admission(0.1, alone=[0.2] * 100)
    waits, before = made.waits[True], made.share(0.05)
    waits.beside.extend([0.4] * 100)
    made._check_bound(waits)
    assert made.share(0.05) == before / 2
    waits.beside.clear()
    waits.beside.extend([0.2] * 100)
    for _ in range(10):
        made._check_bound(waits)
    assert made.share(0.05) == before


def test_pause_holds_and_an_interruption_lets_go():
    made = Admission(1.0)
    made.pause(True)
    begun, done = threading.Event(), threading.Event()

    def work():
        for _ in made.parts(1):
            begun.set()
        done.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert not begun.wait(0.2)
    made.interrupted = lambda: True
    assert done.wait(5)
    assert made.seconds["held"] > 0.1


def test_a_request_that_is_given_up_is_no_longer_in_flight():
    made, _ = admission(0.1)
    with pytest.raises(ConnectionError), made.user(streamed=True):
        raise ConnectionError
    assert (made._waiting, made._answering, made.requests) == (0, 0, 1)
    assert not made.waits[True].alone
    assert not made.waits[True].beside


def test_percentiles():
    values = list(range(1, 101))
    assert [percentile(values, share) for share in (0.01, 0.5, 0.99, 1.0)] == [1, 50, 99, 100]
    assert percentile([5.0], 0.99) == 5.0


def test_what_is_waited_for_while_training_is_paused_is_without_training():
    made, _ = admission(0.1)
    for paused in (False, True):
        made.pause(paused)
        with made.user(streamed=True):
            pass
    assert [len(waits) for waits in (made.waits[True].alone, made.waits[True].beside)] == [1, 1]


def test_a_broken_bound_is_lowered_once_and_not_again_while_training_is_paused():
    made, clock = admission(0.1, alone=[0.2] * 100)
    clock.time = EVERY * WINDOW + WINDOW

    def users(n):
        for _ in range(n):
            with made.user(streamed=True):
                clock.time += 0.2
                made.waits[True].beside.append(0.4)
                clock.time = EVERY * WINDOW + WINDOW

    made.waits[True].beside.extend([0.4] * 100)
    users(FEW)
    assert made._scale == 0.5
    made.pause(True)
    users(10 * FEW)
    assert made._scale == 0.5


def test_signals_pause_and_resume_even_in_the_middle_of_a_change():
    made = Admission(1.0)
    before = signal.getsignal(signal.SIGUSR1)
    with pausing(made):
        with made._changed:  # where a handler that took the lock of another thread would wait for ever
            os.kill(os.getpid(), signal.SIGUSR1)
        assert made.paused
        parts = made.parts(1)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR2)).start()
        assert next(parts) == slice(0, 1)  # waited for in this thread, which the signal reaches
        assert not made.paused
    assert signal.getsignal(signal.SIGUSR1) == before
