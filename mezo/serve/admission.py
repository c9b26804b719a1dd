"""When the trainer may use the engine: users first."""

import statistics
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

LOOK = 0.5  # seconds between looks at whether the trainer was asked to stop
PART = 0.25  # most seconds of one part of the trainer's work
CYCLE = 3.0  # most seconds of a part of several requests and the rest after it
KEPT = 1000  # waits of users that are remembered of each kind
WINDOW = 5.0  # seconds; the trainer is held back in every other one while FEW waits without it are not known
FEW = 20  # waits that the share follows from at least, whatever their age
FRESH = 60.0  # seconds for which more of them count: a server's first waits are longer than all later ones
LATEST = 200  # most waits that it follows from, and those that the bound is checked by
RECENT = 60.0  # seconds for which users who are gone are reckoned with
STEPS = (0.5, 1.25)  # the trainer's share changes by these factors where the bound is broken or held
AIM = 0.5  # of the allowed growth is planned for: a percentile of so few waits is uncertain by about as much
TAIL = 0.01  # of users may wait longer than the bound: their 99th percentile is then within it
MEASURED = 100  # parts that the next one is planned by; then sizes are tried again
ALIKE = 0.95  # of two sizes of which one gets so much of the other's work done the larger is taken


class Waits:
    """How long users waited for the first thing that they got to see, in seconds.

    Streams wait for their first token, other requests for their whole answer.

    Args:
        streamed: of which kind.
    """

    def __init__(self, streamed: bool):
        self.streamed = streamed
        self.alone: deque[tuple[float, float]] = deque(maxlen=LATEST)  # when, and how long, without a part of it
        self.beside: deque[float] = deque(maxlen=KEPT)  # of who found a part running, or waited while one did
        self.met: deque[float] = deque(maxlen=LATEST)  # of who found a part running, from its end on
        self.lately: deque[bool] = deque(maxlen=2 * FEW)  # whether each of the last users waited without a part
        self.checked = self.late = 0  # waits since the bound was last checked, and those beyond it

    def see(self, wait: float, now: float, alone: bool) -> None:
        """A user waited so long, with or without a part of the trainer's."""
        self.lately.append(alone)
        if not alone:
            self.beside.append(wait)
            return
        self.alone.append((now, wait))
        while len(self.alone) > FEW and self.alone[0][0] < now - FRESH:
            self.alone.popleft()

    @property
    def few(self) -> bool:
        """Whether too few of the last users waited without a part."""
        return sum(self.lately) < FEW

    def bound(self, cost: float) -> float:
        """What at most TAIL of users may wait longer than, where the 99th percentile may grow by `cost`."""
        return (1 + cost) * percentile([wait for _, wait in self.alone], 0.99)

    def share(self, took: float, cost: float) -> float:
        """The largest share of users who may find a part of the trainer's running that takes so long.

        Such a user waits for what is left of it, a uniform part u of `took`, and then as long as without it, and a
        little more, e, which is measured. A share f of them raises those who wait longer than x = (1 + AIM cost) p99
        from P(w > x) to (1 - f) P(w > x) + f P(w + u + e > x), which is to be at most TAIL. The w are the waits that
        were seen without the trainer.

        Args:
            took: seconds, > 0.
            cost: by how much the 99th percentile may grow.
        """
        if not self.alone:
            return 1.0
        x, alone = self.bound(AIM * cost), [wait for _, wait in self.alone]
        late = sum(wait > x for wait in alone) / len(alone)
        more = self.more()
        caught = sum(min(1.0, max(0.0, 1 - (x - wait - more) / took)) for wait in alone) / len(alone)
        return min(1.0, (TAIL - late) / (caught - late)) if caught > TAIL else 1.0

    def more(self) -> float:
        """Seconds that who found a part running waits longer, from its end on, than without it; 0 until FEW did."""
        if len(self.met) < FEW or not self.alone:
            return 0.0
        return max(0.0, statistics.fmean(self.met) - statistics.fmean(wait for _, wait in self.alone))

    def row(self) -> dict:
        """What status shows."""
        kinds = {"alone": [wait for _, wait in self.alone], "behind_a_part": self.beside}
        return {
            name: {"n": len(values), **{f"p{p}": percentile(values, p / 100) for p in (50, 99) if values}}
            for name, values in kinds.items()
        }


class Pace:
    """How long parts of the trainer's work take, a + b n seconds for n requests, by those that were measured last.

    a is not small: a forward pass of one request reads all weights, and so does one of many.

    >>> pace = Pace()
    >>> for n in (1, 2, 4):
    ...     pace.see(n, 0.25 + 0.125 * n)
    >>> round(pace.seconds(8), 6), pace.most
    (1.25, 4)
    """

    def __init__(self):
        self._seen: deque[tuple[int, float]] = deque(maxlen=MEASURED)

    def see(self, n: int, took: float) -> None:
        """A part of n requests took so many seconds."""
        self._seen.append((n, took))

    @property
    def most(self) -> int:
        """The most requests of a part that was measured."""
        return max((n for n, _ in self._seen), default=0)

    def seconds(self, n: int) -> float:
        """What a part of n requests is expected to take; 0 where nothing is known."""
        if not self._seen:
            return 0.0
        by_size: defaultdict[int, list[float]] = defaultdict(list)
        for size, took in self._seen:
            by_size[size].append(took)
        sizes, times = list(by_size), [statistics.median(took) for took in by_size.values()]
        if len(sizes) == 1:  # hoped for: so another size is tried
            return times[0]
        at, mean = statistics.fmean(sizes), statistics.fmean(times)
        slope = sum((size - at) * (took - mean) for size, took in zip(sizes, times, strict=True))
        b = max(0.0, slope / sum((size - at) ** 2 for size in sizes))
        return max(0.0, mean - b * at) + b * n


class Admission:
    """Divides the trainer's requests into parts, and holds each back until users leave room for it.

    A part that runs delays whoever comes meanwhile by what is left of it. How many users may find one follows from
    what they wait for without the trainer (`Waits.share`): most could wait a little longer and still be within the
    bound. The trainer rests after each part, so that parts run in that share of the time. A part has as many requests
    as gets most of them done so: more at once are cheaper, and longer parts have a smaller share. No part begins while
    a stream waits for its first token, and while users are being answered parts get `cost` of the time.

    A stream that finds no part running waits as it would without the trainer, since none begins meanwhile: most users
    so tell what is waited for without it, and the latest of them count. Where too few do, because parts run most of the
    time, the trainer is held back in every other `WINDOW`. Where more streams than may be are later than the bound all
    the same, the share is lowered.

    Args:
        cost: by how much what users wait for may grow, such as 0.1; 0: no part runs while there are users.
        now: a clock, in seconds.

    `interrupted` says whether the trainer was asked to stop: then nothing is held back any more.
    """

    def __init__(self, cost: float, now: Callable[[], float] = time.monotonic):
        self.cost, self.now = cost, now
        self.interrupted: Callable[[], bool] = lambda: False
        self._changed = threading.Condition()
        self._waiting = self._answering = 0  # streams before their first token, and all other requests of users
        self._running, self._parts, self._scale, self._ended = False, 0, 1.0, 0.0
        self._paces: defaultdict[str, Pace] = defaultdict(Pace)
        self.limit = PART  # seconds that the next part is expected to take
        self._credit, self._since, self._rested, self._left = 0.0, now(), 0.0, -RECENT
        self.paused, self.requests = False, 0
        self.seconds = dict.fromkeys(("users", "training", "held"), 0.0)
        self.waits = {streamed: Waits(streamed) for streamed in (True, False)}

    @contextmanager
    def user(self, streamed: bool) -> Iterator["UserRequest"]:
        """A user's request, from when it comes until it is answered."""
        request = UserRequest(self, streamed)
        try:
            yield request
            request.saw()
        finally:
            request.end()

    def pause(self, paused: bool) -> None:
        """Hold the trainer back until further notice, or no longer."""
        with self._changed:
            self.paused = paused
            self._changed.notify_all()

    def share(self, took: float) -> float:
        """Share of the time in which parts of so many seconds may run; all of it where no waits are known."""
        known = [waits.share(took, self.cost) for waits in self.waits.values() if waits.alone]
        return self._scale * min(known) if known else 1.0

    def _planned(self, pace: Pace) -> int:
        """Requests of the next part: of powers of 2, up to twice the most so far, those done fastest with all rests."""
        sizes = [2**k for k in range((2 * pace.most).bit_length())] or [1]
        took = {n: max(pace.seconds(n), 1e-6) for n in sizes}
        share = self.share if self._users_about() else lambda seconds: 1.0
        fitting = [n for n in sizes if took[n] <= PART and took[n] <= CYCLE * share(took[n])] or [1]
        rates = {n: n * share(took[n]) / took[n] for n in fitting}
        chosen = max(n for n in fitting if rates[n] >= ALIKE * max(rates.values()))
        self.limit = took[chosen] if pace.most else PART
        return chosen

    def parts(self, n: int, kind: str = "") -> Iterator[slice]:
        """Slices of `n` requests of the trainer, each when there is room; it has run when the next is asked for.

        Args:
            n: requests.
            kind: of requests; those of one kind take alike.
        """
        start = 0
        while start < n:
            with self.part(kind, n - start) as size:
                yield slice(start, start + size)
            start += size

    @contextmanager
    def part(self, kind: str, most: int = 1) -> Iterator[int]:
        """Work of the trainer that the engine does nothing else beside; it begins when there is room.

        Args:
            kind: of work; parts of one kind take alike.
            most: requests that it may have.

        Yields:
            How many requests it is to have.
        """
        self._wait()
        pace = self._paces[kind]
        n, began = min(most, self._planned(pace)), self.now()
        try:
            yield n
        finally:
            took = self._done(began)
        pace.see(n, took)
        if self._users_about():
            rest = took * (1 / max(self.share(max(took, 1e-6)), 1e-3) - 1)
            # several requests rest longer only where they were not planned beside these users
            self._rested = self.now() + (rest if n == 1 else min(rest, CYCLE))

    def row(self) -> dict:
        """What status shows."""
        with self._changed:
            kinds = {"first_token": self.waits[True].row(), "whole_answer": self.waits[False].row()}
            more = {"first_token": self.waits[True].more(), "whole_answer": self.waits[False].more()}
            return {"requests": self.requests, "seconds_waited": kinds, "seconds_more_after_a_part": more}

    def parts_row(self) -> dict:
        """Of each kind of part: how many requests were in the largest one, and the seconds that such a one takes."""
        with self._changed:
            paces = {kind: pace for kind, pace in self._paces.items() if pace.most}
            return {kind: {"requests": pace.most, "seconds": pace.seconds(pace.most)} for kind, pace in paces.items()}

    def _wait(self) -> None:
        began = self.now()
        with self._changed:
            while not (self._room() or self.interrupted()):
                self._changed.wait(LOOK if self._waiting or self.paused else min(LOOK, max(self.limit, 0.002)))
                self._account()
            self.seconds["held"] += self.now() - began
            self._running, self._parts = True, self._parts + 1

    def _done(self, began: float) -> float:
        with self._changed:
            self._account()
            took = self.now() - began
            self._running, self._ended = False, self.now()
            self.seconds["training"] += took
            if self._waiting or self._answering:
                self._credit -= took
        return took

    def _room(self) -> bool:
        """Whether a part may begin now."""
        if self.paused or self._waiting or self.now() < self._rested or self._held_back():
            return False
        return not self._answering or self._credit > 0

    def _users_about(self) -> bool:
        return bool(self._waiting or self._answering) or self.now() - self._left < RECENT

    def _held_back(self) -> bool:
        """Whether this is a window in which it is measured what users wait for without the trainer."""
        few = all(waits.few for waits in self.waits.values())
        return few and self._users_about() and int(self.now() / WINDOW) % 2 == 0

    def _account(self) -> None:
        """The time that users were answered in gives the trainer a share of it."""
        now = self.now()
        if self._waiting or self._answering:
            self.seconds["users"] += now - self._since
            self._credit = min(self._credit + self.cost * (now - self._since), max(self.limit, 0.0))
        self._since = now

    def _check_bound(self, waits: Waits, wait: float) -> None:
        """Give the trainer a smaller or larger share after LATEST waits, by how many were beyond the bound.

        Twice as many as may be are within chance. Each is compared with what was waited for without the trainer when it
        came, and counts once.
        """
        if len(waits.alone) < FEW or self.paused:
            return
        waits.checked, waits.late = waits.checked + 1, waits.late + (wait > waits.bound(self.cost))
        if waits.checked == LATEST:
            self._scale = min(1.0, max(TAIL, self._scale * STEPS[waits.late <= 2 * TAIL * LATEST]))
            waits.checked = waits.late = 0


class UserRequest:
    """A user's request that is being answered.

    Args:
        admission: what it belongs to.
        streamed: whether the answer is seen as it grows.
    """

    def __init__(self, admission: Admission, streamed: bool):
        self.admission, self.streamed, self.seen = admission, streamed, False
        with admission._changed:
            admission._account()
            self._count(1)
            self.began, self.parts, self.met = admission.now(), admission._parts, admission._running

    def saw(self) -> None:
        """The user has something to see; only the first time counts."""
        if self.seen:
            return
        own = self.admission
        with own._changed:
            own._account()
            self._count(-1)
            self.seen = True
            self._count(1)
            waits, wait, none_began = own.waits[self.streamed], own.now() - self.began, self.parts == own._parts
            waits.see(wait, own.now(), none_began and not self.met)
            if self.met and none_began and own._ended >= self.began:
                waits.met.append(own.now() - own._ended)
            if self.streamed:  # of other answers, those without a part are the short ones
                own._check_bound(waits, wait)
            own._changed.notify_all()

    def end(self) -> None:
        """It is answered, or given up."""
        own = self.admission
        with own._changed:
            own._account()
            self._count(-1)
            own.requests += 1
            own._left = own.now()
            own._changed.notify_all()

    def _count(self, by: int) -> None:
        if self.streamed and not self.seen:
            self.admission._waiting += by
        else:
            self.admission._answering += by


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of some values that at least a share of them does not exceed.

    >>> percentile([3.0, 1.0, 2.0, 4.0], 0.5)
    2.0
    """
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]
