"""Users first: on a clock that the test moves."""

import os
import random
import signal
import threading

import pytest

from mezo.serve.admission import AIM, CYCLE, FEW, FRESH, LATEST, PART, TAIL, WINDOW, Admission, Waits, percentile
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
    known(made.waits[True], alone, clock.time)
    return made, clock


def known(waits, seconds, now=0.0):
    """Users waited so long without a part of the trainer's."""
    for wait in seconds:
        waits.see(wait, now, alone=True)


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
    alone = [rng.gammavariate(8, 0.01) for _ in range(LATEST)]
    known(waits, alone)
    bound = (1 + 0.1 * AIM) * percentile(alone, 0.99)
    shares = [waits.share(took, 0.1) for took in (0.02, 0.05, 0.1, 0.3)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.1
    for took, share in zip((0.05, 0.1, 0.3), shares[1:], strict=True):
        late = [
            rng.choice(alone) + (rng.random() * took if rng.random() < share else 0.0) > bound for _ in range(100_000)
        ]
        assert sum(late) / len(late) == pytest.approx(TAIL, rel=0.12)


def test_what_a_part_costs_beyond_its_end_makes_the_share_smaller():
    """As where a batch that is done has to be answered before the next one begins."""
    made, clock = admission(0.1, alone=[0.1] * FEW)
    waits, before = made.waits[True], made.share(0.03)
    assert waits.more() == 0.0
    for number in range(1, FEW + 1):
        clock.time = 10 * WINDOW * number + WINDOW  # the part before has been rested after
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
    known(waits, [0.2] * FEW)
    assert waits.share(0.2 * 0.1 * AIM - 0.001, 0.1) == 1.0


def test_training_rests_where_one_request_is_longer_than_the_bound():
    made, clock = admission(0.1, alone=[0.2] * FEW)
    known(made.waits[False], [0.2] * FEW, clock.time)
    with made.user(streamed=True):
        pass
    sizes(made, clock, 1, 0.05)
    share = TAIL / (1 - 0.2 * 0.1 * AIM / 0.05)  # of users find it running, and one in a hundred too much of it left
    rest = 0.05 * (1 / share - 1)
    clock.time += rest - 0.01
    assert not made._room()
    clock.time += 0.02
    assert made._room()


def test_training_is_held_back_in_every_other_window_while_too_few_wait_without_it():
    made, clock = admission(0.1)
    held = lambda: [made._held_back() for clock.time in [WINDOW * (i + 0.5) for i in range(6)]]  # noqa: E731
    assert not any(held()), "there are no users"
    waits = made.waits[True]
    with made.user(streamed=True):
        assert held() == [True, False] * 3
        known(waits, [0.1] * FEW)
        assert not any(held())
        for _ in range(FEW + 1):  # parts run all the time: nobody tells any more what is waited for without them
            waits.see(0.5, clock.time, alone=False)
        assert held() == [True, False] * 3


def test_waits_that_are_old_are_forgotten_where_newer_ones_suffice():
    waits = Waits(streamed=True)
    known(waits, [0.9] * 5 * FEW, now=0.0)
    known(waits, [0.2] * (FEW - 1), now=FRESH + 1.0)
    assert waits.bound(0.0) == 0.9
    known(waits, [0.2], now=FRESH + 1.0)
    assert (waits.bound(0.0), len(waits.alone)) == (0.2, FEW)
    known(waits, [0.2] * 2 * LATEST, now=FRESH + 1.0)
    assert len(waits.alone) == LATEST


def test_who_finds_no_part_waits_without_the_trainer_though_it_trains():
    made, clock = admission(0.1)
    with made.part("scores"):
        clock.time += 0.05
    with made.user(streamed=True) as request:
        clock.time += 0.2
        request.saw()
    clock.time = 50 * WINDOW - 1.0  # rested
    with made.part("scores"), made.user(streamed=True) as request:
        clock.time += 0.4
        request.saw()
    with made.user(streamed=False):
        clock.time = 100 * WINDOW - 1.0
        made._account()
        with made.part("scores"):
            clock.time += 0.05
    assert [wait for _, wait in made.waits[True].alone] == [pytest.approx(0.2)]
    assert list(made.waits[True].beside) == [pytest.approx(0.4)]
    assert not made.waits[False].alone


def test_a_bound_that_is_broken_makes_the_share_smaller_and_larger_again():
    made, _ = admission(0.1, alone=[0.2] * 100)
    waits, before = made.waits[True], made.share(0.05)

    def users(late):
        for i in range(LATEST):
            made._check_bound(waits, 0.4 if i < late else 0.2)

    users(late=int(2 * TAIL * LATEST))
    assert made.share(0.05) == before, "within chance"
    users(late=int(2 * TAIL * LATEST) + 1)
    assert made.share(0.05) == before / 2
    for _ in range(10):
        users(late=0)
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


def test_waits_while_training_is_paused_say_nothing_of_the_bound():
    made, _ = admission(0.1, alone=[0.2] * 100)
    made.pause(True)
    for _ in range(2 * LATEST):
        made._check_bound(made.waits[True], 0.4)
    assert (made._scale, made.waits[True].checked) == (1.0, 0)


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
