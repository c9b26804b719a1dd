"""Attention of the engine on a CPU: requests of like length in one call, equal to the engine's own of one a call."""

import pytest
import torch

HEADS, KV_HEADS, SIZE = 6, 2, 8


def batch(cases, seed=0):
    """Queries, cache and where it has each request's tokens; cases are (tokens, new ones among them)."""
    draw = torch.Generator().manual_seed(seed)
    lengths, new = (torch.tensor(column) for column in zip(*cases, strict=True))
    total, longest = int(lengths.sum()), int(lengths.max())
    places = torch.randperm(3 * total, generator=draw)
    rows = torch.randperm(len(cases) + 3, generator=draw)[: len(cases)]
    table = torch.zeros(len(cases) + 3, longest + 5, dtype=torch.int32)
    start = 0
    for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
        table[row, :length] = places[start : start + length].int()
        start += length
    query = torch.randn(int(new.sum()), HEADS, SIZE, generator=draw)
    keys, values = (torch.randn(3 * total, KV_HEADS, SIZE, generator=draw) for _ in range(2))
    return query, keys, values, table, rows, lengths, new


BATCHES = {
    "whole prompts": [(n, n) for n in (7, 3, 7, 12, 3, 1)],
    "one new token each": [(n, 1) for n in (7, 3, 40, 12, 3, 1)],
    "cached and new": [(9, 4), (30, 4), (4, 4), (12, 2), (5, 5)],
    "one request": [(6, 2)],
    "long prompts, some of one length in a row": [
        (9, 9),
        (9, 9),
        (12, 12),
        (3, 3),
        (9, 9),
        (14, 4),
        (4, 4),
        (4, 4),
        (8, 1),
    ],
}


def made(keys, values, table, rows, lengths, new):
    """What a layer made of the new tokens, as it lies in a batch: what the cache has of them."""
    places = [table[row, total - n : total] for row, total, n in zip(rows, lengths, new, strict=True)]
    return tuple(cache[torch.cat(places).long()] for cache in (keys, values))


@pytest.fixture
def backend():
    module = pytest.importorskip("sglang.srt.layers.attention.torch_native_backend")
    return module.TorchNativeAttnBackend.__new__(module.TorchNativeAttnBackend)


@pytest.mark.parametrize("window", [None, 2, 100])
@pytest.mark.parametrize("name", list(BATCHES))
def test_requests_together_are_each_alone(backend, name, window):
    from mezo.runtimes.sglang.inside import attention

    query, keys, values, table, rows, lengths, new = batch(BATCHES[name])
    options = {"scaling": 0.3, "enable_gqa": True, "sliding_window_size": window, "causal": True}
    arguments = (keys, values, table, rows, lengths, lengths - new, new)
    own, ours = type(backend)._run_sdpa_forward_extend, torch.full_like(query, torch.nan)
    expected = own(backend, query, torch.empty_like(query), *arguments, **options)
    refused = lambda *args, **kwargs: pytest.fail("the engine's own was called")  # noqa: E731
    assert attention.extend(refused, backend, query, ours, *arguments, **options) is ours
    assert torch.allclose(ours, expected, atol=1e-5)
    assert expected.std() > 0.1


@pytest.mark.parametrize("window", [None, 2, 10, 100])
@pytest.mark.parametrize("name", list(BATCHES))
def test_requests_without_cached_tokens_are_taken_as_they_were_made(backend, name, window):
    from mezo.runtimes.sglang.inside import attention

    query, keys, values, table, rows, lengths, new = batch(BATCHES[name])
    options = {"scaling": 0.3, "enable_gqa": True, "sliding_window_size": window, "causal": True}
    arguments = (table, rows, lengths, lengths - new, new)
    own = type(backend)._run_sdpa_forward_extend
    expected = own(backend, query, torch.empty_like(query), keys, values, *arguments, **options)
    attention.see_made(backend, query, *made(keys, values, table, rows, lengths, new), None, None)
    _, others = attention.runs_of(lengths, new, window)
    unread = keys.clone()
    for i in set(range(len(rows))) - set(others):  # of these nothing is read from the cache
        unread[table[rows[i], : lengths[i]].long()] = torch.nan
    found = attention.extend(
        None, backend, query, torch.full_like(query, torch.nan), unread, values, *arguments, **options
    )
    assert torch.allclose(found, expected, atol=1e-5)


def test_runs_are_requests_of_one_length_in_a_row(backend):
    from mezo.runtimes.sglang.inside import attention

    *_, lengths, new = batch(BATCHES["long prompts, some of one length in a row"])
    run = attention.Run
    assert attention.runs_of(lengths, new, None) == (
        [run(0, 2, 9), run(18, 1, 12), run(33, 1, 9), run(46, 2, 4)],
        [3, 5, 8],
    )
    assert attention.runs_of(lengths, new, 8) == ([run(0, 2, 9), run(33, 1, 9), run(46, 2, 4)], [2, 3, 5, 8])


@pytest.mark.parametrize("what", ["a cache of 16 bits", "not written", "another layer's"])
def test_what_the_cache_has_otherwise_is_taken_from_it(backend, what):
    from mezo.runtimes.sglang.inside import attention

    query, keys, values, table, rows, lengths, new = batch(BATCHES["long prompts, some of one length in a row"])
    options = {"scaling": 0.3, "enable_gqa": True, "causal": True}
    arguments = (table, rows, lengths, lengths - new, new)
    given = made(keys + 1, values + 1, table, rows, lengths, new)
    if what == "a cache of 16 bits":
        keys, values = keys.bfloat16(), values.bfloat16()
    attention.see_made(
        backend, query, *((None, None) if what == "another layer's" else given), None, None, what != "not written"
    )
    own = type(backend)._run_sdpa_forward_extend
    expected = own(backend, query, torch.empty_like(query), keys.float(), values.float(), *arguments, **options)
    found = attention.extend(None, backend, query, torch.empty_like(query), keys, values, *arguments, **options)
    assert torch.allclose(found, expected, atol=1e-5)


def test_decoding_together_is_each_alone(backend):
    from mezo.runtimes.sglang.inside import attention

    query, keys, values, table, rows, lengths, _ = batch(BATCHES["one new token each"])
    options = {"scaling": 0.3, "enable_gqa": True, "causal": False}
    arguments = (keys, values, table, rows, lengths)
    expected = type(backend)._run_sdpa_forward_decode(backend, query, torch.empty_like(query), *arguments, **options)
    found = attention.decode(None, backend, query, torch.empty_like(query), *arguments, **options)
    assert torch.allclose(found, expected, atol=1e-5)


def test_groups_are_of_one_forward_pass(backend, monkeypatch):
    """Layers share them; the next pass, of other requests, has others."""
    from mezo.runtimes.sglang.inside import attention

    calls = []
    own = attention.groups_of
    monkeypatch.setattr(attention, "groups_of", lambda *arguments: calls.append(1) or own(*arguments))
    for passes, cases in enumerate(("cached and new", "whole prompts"), 1):
        query, keys, values, table, rows, lengths, new = batch(BATCHES[cases])
        arguments = (keys, values, table, rows, lengths, lengths - new, new)
        attention.forget(None, backend)
        for _ in range(3):
            attention.extend(None, backend, query, query.clone(), *arguments, causal=True, enable_gqa=True)
        assert len(calls) == passes


@pytest.mark.parametrize("what", ["encoder", "cross", "both ways"])
def test_what_is_not_plain_is_the_engines_own(backend, what):
    from mezo.runtimes.sglang.inside import attention

    query, keys, values, table, rows, lengths, new = batch(BATCHES["one request"])
    encoder = torch.tensor([3]) if what == "encoder" else None
    options = {"causal": what != "both ways", "is_cross_attn": what == "cross"}
    asked = (query, query, keys, values, table, rows, lengths, lengths - new, new, encoder)
    answer = attention.extend(lambda *args, **kwargs: (args[1:], kwargs), backend, *asked, **options)
    assert answer == (asked, options)
