"""Which prefixes are sent ahead, and when they are sent again; no engine is needed."""

import pytest

from mezo.runtimes.rows import Row
from mezo.runtimes.sglang.reuse import PrefixCache

INSTRUCTION = tuple(range(100, 120))


def prompts(*last):
    """The rows of examples that share an instruction."""
    return [[Row((*INSTRUCTION, token, 5), (len(INSTRUCTION) + 1,), ((7, 8),))] for token in last]


SLOTS = ("plus0", "minus0")


def ahead(cache, *last, slots=SLOTS):
    """Prefixes by slot of each wave."""
    waves = cache.ahead({slots: prompts(*last)})
    return [{name: [ids for slot, ids in wave if slot == name] for name, _ in wave} for wave in waves]


def both(*prefixes):
    return {slot: list(prefixes) for slot in SLOTS}


def test_each_version_of_theta_sends_the_shared_prefix_once():
    cache = PrefixCache(used=True, shared=False)
    cache.theta_changed()
    first = cache.namespace
    assert ahead(cache, 1, 2) == [both(INSTRUCTION)]
    assert ahead(cache, 3, 4) == []
    cache.theta_changed()
    assert cache.namespace != first
    assert ahead(cache, 3, 4) == [both(INSTRUCTION)]


def test_each_direction_is_sent_the_prefix_of_its_own_examples():
    cache = PrefixCache(used=True, shared=False)
    cache.theta_changed()
    groups = {("plus0", "minus0"): prompts(1, 2), ("plus1", "minus1"): prompts(3, 4), ("plus2", "minus2"): prompts(5)}
    slots = ("plus0", "minus0", "plus1", "minus1")
    assert cache.ahead(groups) == [[(slot, INSTRUCTION) for slot in slots]]
    assert cache.ahead(groups) == []


def test_one_namespace_sends_each_prompt_once_whatever_theta_is():
    cache = PrefixCache(used=True, shared=True)
    assert ahead(cache, 1, 2) == [{"plus0": [INSTRUCTION]}, {"plus0": [(*INSTRUCTION, 1), (*INSTRUCTION, 2)]}]
    cache.theta_changed()
    assert cache.namespace == ""
    assert ahead(cache, 2, 3, slots=("plus1", "minus1")) == [{"plus1": [(*INSTRUCTION, 3)]}]
    cache.flushed()
    assert ahead(cache, 2) == [{"plus0": [(*INSTRUCTION, 2)]}]


@pytest.mark.parametrize("shared", [False, True])
def test_nothing_is_sent_ahead_of_a_cache_that_is_off(shared):
    assert PrefixCache(used=False, shared=shared).ahead({SLOTS: prompts(1, 2)}) == []
