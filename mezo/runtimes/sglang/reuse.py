"""Which prefixes requests share, and which are sent ahead so that the cache holds them."""

from collections.abc import Sequence

MIN_SHARED = 8  # tokens that a warm-up must save for each request it serves, to be worth a request of its own


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest prefix that all sequences share.

    >>> common_prefix([(1, 2, 3), (1, 2, 4, 5)])
    2
    """
    first, last = min(sequences), max(sequences)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def warm_ups(groups: Sequence[Sequence[tuple[Sequence[int], int]]]) -> list[list[tuple[int, ...]]]:
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
    own = [(group, _shared(group)) for group in groups if len(group) > 1]
    prefixes = [tuple(group[0][0][:length]) for group, length in own if length - base >= MIN_SHARED]
    return waves + ([prefixes] if prefixes else [])


def _shared(requests: Sequence[tuple[Sequence[int], int]]) -> int:
    """Tokens that every one of several requests can take from a cache filled by one prefix."""
    if len(requests) < 2:
        return 0
    return min(common_prefix([ids for ids, _ in requests]), *(usable for _, usable in requests))
