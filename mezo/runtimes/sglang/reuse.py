"""Which requests may share keys and values in the engine's cache, and which prefixes are sent ahead to fill it.

Whether keys and values depend on theta at all is a fact of the model and of what is trained: `mezo.models.families`.
"""

import itertools
from collections.abc import Mapping, Sequence

from mezo.runtimes.rows import Row

MIN_SHARED = 8  # tokens that a warm-up must save for each request it serves, to be worth a request of its own

Prefixes = list[tuple[int, ...]]
"""Token ids of requests that are sent in one batch."""

Request = tuple[str, tuple[int, ...]]
"""Slot and token ids."""


class PrefixCache:
    """The engine's radix cache as the trainer sees it: its namespaces, and the prefixes it has been shown.

    Args:
        used: False is --radix off: nothing is sent ahead.
        shared: no key or value depends on theta, so all slots and all versions of theta have one namespace; else each
            version of theta has its own, which tells slots apart by itself.

    >>> cache, rows = PrefixCache(used=True, shared=True), [Row((3, 4, 5), (2,), ((7,),))]
    >>> slots = {("plus0", "minus0"): [rows]}
    >>> cache.ahead(slots), cache.ahead(slots)
    ([[('plus0', (3, 4))]], [])
    """

    def __init__(self, used: bool, shared: bool):
        self.used, self.shared = used, shared
        self.namespace = ""
        self._versions = itertools.count()
        self._seen: set = set()  # prefixes, or where slots differ (slot, prefix)

    def theta_changed(self) -> None:
        """The slots hold something else: requests live in a new namespace from now on, unless all share one."""
        if not self.shared:
            self.namespace = f"mezo-{next(self._versions)}"
            self._seen.clear()

    def flushed(self) -> None:
        """The engine has forgotten everything."""
        self._seen.clear()

    def ahead(self, groups: Mapping[tuple[str, ...], Sequence[Sequence[Row]]]) -> list[list[Request]]:
        """Requests to send before the rows of some examples, in waves, each after the one before.

        In a shared namespace every prompt's first visit goes ahead, once and for all, under one slot; else what several
        rows share, under every slot that they go to.

        Args:
            groups: rows of examples, by the slots that they go to.
        """
        if not self.used:
            return []
        if self.shared:
            (slot, *_), *_ = groups
            waves = self._first_visits([group for groups_of_slots in groups.values() for group in groups_of_slots])
            return [[(slot, ids) for ids in wave] for wave in waves]
        each = [self._shared_prefixes(slots, own) for slots, own in groups.items()]
        return [list(itertools.chain(*waves)) for waves in itertools.zip_longest(*each, fillvalue=[])]

    def _first_visits(self, groups: Sequence[Sequence[Row]]) -> list[Prefixes]:
        fresh = (row.ids[: row.positions[0]] for group in groups for row in group if row.positions[0])
        prompts = [prompt for prompt in dict.fromkeys(fresh) if prompt not in self._seen]
        self._seen |= set(prompts)
        return [*warm_ups([[(ids, len(ids))] for ids in prompts])[:1], prompts] if prompts else []

    def _shared_prefixes(self, slots: tuple[str, ...], groups: Sequence[Sequence[Row]]) -> list[list[Request]]:
        waves = []
        for wave in warm_ups([[(row.ids, row.positions[0]) for row in group] for group in groups]):
            fresh = [(slot, ids) for slot in slots for ids in wave if (slot, ids) not in self._seen]
            self._seen.update(fresh)
            waves += [fresh] if fresh else []
        return waves


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
