"""Which requests may share keys and values in the engine's cache, and which prefixes are sent ahead to fill it.

Whether keys and values depend on theta at all is a fact of the model and of what is trained: `mezo.models.families`.
"""

import itertools
from collections.abc import Sequence

from mezo.runtimes.rows import Row

MIN_SHARED = 8  # tokens that a warm-up must save for each request it serves, to be worth a request of its own

Prefixes = list[tuple[int, ...]]
"""Token ids of requests that are sent in one batch."""


class PrefixCache:
    """The engine's radix cache as the trainer sees it: its namespaces, and the prefixes it has been shown.

    Args:
        used: False is --radix off: nothing is sent ahead.
        shared: no key or value depends on theta, so all slots and all versions of theta have one namespace; else each
            version of theta has its own, which tells slots apart by itself.

    >>> cache, rows = PrefixCache(used=True, shared=True), [Row((3, 4, 5), (2,), ((7,),))]
    >>> cache.ahead([rows]), cache.ahead([rows])
    ([[(3, 4)]], [])
    """

    def __init__(self, used: bool, shared: bool):
        self.used, self.shared = used, shared
        self.namespace = ""
        self._versions = itertools.count()
        self._seen: set[tuple[int, ...]] = set()

    def theta_changed(self) -> None:
        """The slots hold something else: requests live in a new namespace from now on, unless all share one."""
        if not self.shared:
            self.namespace = f"mezo-{next(self._versions)}"
            self._seen.clear()

    def flushed(self) -> None:
        """The engine has forgotten everything."""
        self._seen.clear()

    def owners(self, slots: Sequence[str]) -> Sequence[str]:
        """Slots for which prefixes are sent ahead: in a shared namespace one of them serves all."""
        return slots[:1] if self.shared else slots

    def ahead(self, groups: Sequence[Sequence[Row]]) -> list[Prefixes]:
        """Prefixes to send before the rows of some examples, in waves, each after the one before.

        In a shared namespace every prompt's first visit goes ahead, once and for all; else what several rows share.
        """
        if not self.used:
            return []
        requests = [[(row.ids, row.positions[0]) for row in group] for group in groups]
        if not self.shared:
            waves = [[ids for ids in wave if ids not in self._seen] for wave in warm_ups(requests)]
            self._seen.update(*waves)
            return [wave for wave in waves if wave]
        fresh = (ids[:n] for group in requests for ids, n in group if n)
        prompts = [prompt for prompt in dict.fromkeys(fresh) if prompt not in self._seen]
        self._seen |= set(prompts)
        return [*warm_ups([[(ids, len(ids))] for ids in prompts])[:1], prompts] if prompts else []


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest prefix that all sequences share.

    >>> common_prefix([(1, 2, 3), (1, 2, 4, 5)])
    2
    """
    first, last = min(sequences), max(sequences)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def warm_ups(groups: Sequence[Sequence[tuple[Sequence[int], int]]]) -> list[Prefixes]:
    """Prefixes to send ahead, in waves, so that the requests after them find every shared token in the cache.

    Args:
        groups: requests of one namespace by example, each (token ids, tokens that may be read from a cache).
    Returns:
        At most two waves: the prefix of all requests, then that of each example with several requests. A prefix is
        left out where it saves less than MIN_SHARED tokens a request.

    >>> instruction = tuple(range(100))
    >>> warm_ups([[(instruction + (200,), 100)], [(instruction + (201,), 100)]]) == [[instruction]]
    True
    """
    requests = [request for group in groups for request in group]
    shared = _shared(requests)
    waves = [[tuple(requests[0][0][:shared])]] if shared >= MIN_SHARED else []
    base = shared if waves else 0
    lengths = [(group, _shared(group)) for group in groups if len(group) > 1]
    prefixes = [tuple(group[0][0][:length]) for group, length in lengths if length - base >= MIN_SHARED]
    return waves + ([prefixes] if prefixes else [])


def _shared(requests: Sequence[tuple[Sequence[int], int]]) -> int:
    """Tokens that every one of several requests can take from a cache filled by one prefix."""
    if len(requests) < 2:
        return 0
    return min(common_prefix([ids for ids, _ in requests]), *(usable for _, usable in requests))
