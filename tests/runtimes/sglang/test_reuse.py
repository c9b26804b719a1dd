"""Which prefixes are sent ahead, and when they are sent again; no engine is needed."""

import pytest

from mezo.runtimes.rows import Row
from mezo.runtimes.sglang.reuse import PrefixCache

INSTRUCTION = tuple(range(100, 120))


def prompts(*last):
    """The rows of examples that share an instruction."""
    return [[Row((*INSTRUCTION, token, 5), (len(INSTRUCTION) + 1,), ((7, 8),))] for token in last]


def test_each_version_of_theta_sends_the_shared_prefix_once():
    cache = PrefixCache(used=True, shared=False)
    cache.theta_changed()
    first = cache.namespace
    assert cache.ahead(prompts(1, 2)) == [[INSTRUCTION]]
    assert cache.ahead(prompts(3, 4)) == []
    cache.theta_changed()
    assert cache.namespace != first
    assert cache.ahead(prompts(3, 4)) == [[INSTRUCTION]]
    assert cache.owners(["plus0", "minus0"]) == ["plus0", "minus0"]


def test_one_namespace_sends_each_prompt_once_whatever_theta_is():
    cache = PrefixCache(used=True, shared=True)
    assert cache.ahead(prompts(1, 2)) == [[INSTRUCTION], [(*INSTRUCTION, 1), (*INSTRUCTION, 2)]]
    cache.theta_changed()
    assert cache.namespace == ""
    assert cache.ahead(prompts(2, 3)) == [[(*INSTRUCTION, 3)]]
    assert cache.owners(["plus0", "minus0"]) == ["plus0"]
    cache.flushed()
    assert cache.ahead(prompts(2)) == [[(*INSTRUCTION, 2)]]


@pytest.mark.parametrize("shared", [False, True])
def test_nothing_is_sent_ahead_of_a_cache_that_is_off(shared):
    assert PrefixCache(used=False, shared=shared).ahead(prompts(1, 2)) == []
