"""SGLang's attention on a CPU, with requests of like length in one call; its own runs one call a request (0.5.23).

It also works out queries for the whole of a request whose keys and values are cached but for the last token, and throws
them away. Here a request has the queries of its new tokens alone. Where no token of a request is cached its keys and
values are taken as the layer made them, without a copy. Where encoders are involved the engine's own runs.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

from mezo.runtimes.rows import by_length

if TYPE_CHECKING:
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

CALL = 64  # tokens of keys and values whose time one more call takes
FEWEST = 8  # tokens of a run whose copies take as long as one more call


@dataclass(frozen=True)
class Run:
    """Requests of one length, none of it cached, that lie one after the other in the batch: a call without copies.

    Args:
        start: place of the first token in the batch.
        requests: how many.
        length: tokens of each.
    """

    start: int
    requests: int
    length: int

    def of(self, tokens: torch.Tensor) -> torch.Tensor:
        """The view (requests, length, heads, head_dim) of what the whole batch has, (tokens, heads, head_dim)."""
        rows = tokens[self.start : self.start + self.requests * self.length]
        return rows.unflatten(0, (self.requests, self.length))


@dataclass(frozen=True)
class Group:
    """Requests that are one call of attention.

    Args:
        queries: (requests, new) place of each new token in the batch.
        cached: (requests, length) place of each token in the cache; short requests repeat their last.
        mask: (requests, 1, new, length) bool, what each new token sees; None where `causal` says it or it is all.
        causal: no token is cached, so each sees those up to itself.
    """

    queries: torch.Tensor
    cached: torch.Tensor
    mask: torch.Tensor | None
    causal: bool


def runs_of(lengths: torch.Tensor, new: torch.Tensor, window: int | None) -> tuple[list[Run], list[int]]:
    """Runs that are worth a call of their own, and the numbers of the other requests; see `groups_of`."""
    runs, others, start, first = [], [], 0, 0
    of_request = zip(lengths.tolist(), new.tolist(), strict=True)
    for (total, count), members in itertools.groupby(of_request):
        requests = len(list(members))
        seen = window is None or total <= window + 1  # each token sees all before it
        if total == count and seen and requests * count >= FEWEST:
            runs.append(Run(start, requests, count))
        else:
            others += range(first, first + requests)
        start, first = start + requests * count, first + requests
    return runs, others


def groups_of(
    req_to_token: torch.Tensor,
    requests: torch.Tensor,
    lengths: torch.Tensor,
    new: torch.Tensor,
    window: int | None,
    among: Sequence[int],
) -> list[Group]:
    """Requests with as many new tokens and nearly as many cached ones, together.

    Args:
        req_to_token: (any, longest) place in the cache of each token of a request.
        requests: (requests,) their rows there.
        lengths: (requests,) tokens, the new ones included.
        new: (requests,) new tokens, which the batch has one request after the other.
        window: how many tokens back each sees, None for all.
        among: numbers of the requests that are wanted.
    """
    total, fresh = lengths.tolist(), new.tolist()
    begins = (new.cumsum(0) - new).tolist()
    groups = []
    for count in sorted({fresh[i] for i in among}):
        some = [i for i in among if fresh[i] == count]
        for part in by_length([total[i] for i in some], CALL):
            chosen = [some[i] for i in part]
            longest = max(total[i] for i in chosen)
            ends = torch.tensor([total[i] for i in chosen])
            at = torch.arange(longest)
            cached = req_to_token[requests[chosen]][:, :longest]
            cached = cached.gather(1, at.expand(len(chosen), -1).minimum(ends[:, None] - 1))
            causal = all(total[i] == count for i in chosen)
            place = ends[:, None] - count + torch.arange(count)  # of each new token in its request
            seen = at <= place[:, :, None]
            if window is not None:
                seen &= at >= place[:, :, None] - window
            plain = (causal and window is None) or bool(seen.all())
            queries = torch.tensor([begins[i] for i in chosen])[:, None] + torch.arange(count)
            groups.append(Group(queries, cached.long(), None if plain else seen[:, None], causal and plain))
    return groups


def forget(result: None, backend: "TorchNativeAttnBackend", *args, **kwargs) -> None:
    """After `init_forward_metadata`: groups are of one forward pass, whose layers share them."""
    backend.mezo_groups = {}


def see_made(
    backend: "TorchNativeAttnBackend",
    query: torch.Tensor,
    keys: torch.Tensor | None,
    values: torch.Tensor | None,
    layer: object,
    forward_batch: object,
    save_kv_cache: bool = True,
) -> None:
    """Before `forward_extend`: keep what the layer made for the new tokens, if it is what the cache will hold of them.

    Args:
        backend: whose method it is.
        query, layer, forward_batch: its arguments.
        keys, values: (tokens, heads of keys, head_dim); None where the layer takes those of another.
        save_kv_cache: they are written to the cache.
    """
    backend.mezo_made = None if keys is None or values is None or not save_kv_cache else (keys, values)


def extend(
    original: Callable,
    backend: "TorchNativeAttnBackend",
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    requests: torch.Tensor,
    lengths: torch.Tensor,
    prefixes: torch.Tensor,
    new: torch.Tensor,
    encoder_lens: torch.Tensor | None = None,
    **options,
) -> torch.Tensor:
    """Around `_run_sdpa_forward_extend`; its arguments, in order.

    Args:
        original: the method.
        backend: whose method it is.
        query: (new tokens, heads, head_dim).
        output: as large; written and returned.
        k_cache, v_cache: (tokens, heads of keys, head_dim).
        req_to_token, requests, lengths, new: see `groups_of`.
        prefixes: (requests,) cached tokens.
        encoder_lens: of an encoder.
        options: scaling, enable_gqa, causal, is_cross_attn, sliding_window_size.
    """
    if encoder_lens is not None or not options.get("causal") or options.get("is_cross_attn"):
        return original(
            backend,
            query,
            output,
            k_cache,
            v_cache,
            req_to_token,
            requests,
            lengths,
            prefixes,
            new,
            encoder_lens,
            **options,
        )
    return _attend(backend, query, output, k_cache, v_cache, (req_to_token, requests, lengths, new), options)


def decode(
    original: Callable,
    backend: "TorchNativeAttnBackend",
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    requests: torch.Tensor,
    lengths: torch.Tensor,
    encoder_lens: torch.Tensor | None = None,
    **options,
) -> torch.Tensor:
    """Around `_run_sdpa_forward_decode`: each request has one new token. See `extend`."""
    if encoder_lens is not None or options.get("is_cross_attn"):
        return original(
            backend, query, output, k_cache, v_cache, req_to_token, requests, lengths, encoder_lens, **options
        )
    new = torch.ones_like(lengths)
    return _attend(
        backend, query, output, k_cache, v_cache, (req_to_token, requests, lengths, new), options, decoding=True
    )


def _attend(
    backend: "TorchNativeAttnBackend",
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: tuple[torch.Tensor, ...],
    options: dict,
    decoding: bool = False,
) -> torch.Tensor:
    """Attention of every group, written to `output`."""
    window = options.get("sliding_window_size")
    window = None if window is None or window < 0 else window
    made = None if decoding else backend.__dict__.get("mezo_made")
    form = lambda tensor: (tensor.dtype, tensor.shape[1:])  # noqa: E731
    if made and (form(made[0]), form(made[1])) != (form(k_cache), form(v_cache)):  # the cache has them rounded, say
        made = None
    kept = backend.__dict__.setdefault("mezo_groups", {})
    if (window, bool(made)) not in kept:
        _, requests, lengths, new = batch
        runs, others = runs_of(lengths, new, window) if made else ([], range(len(requests)))
        kept[window, bool(made)] = runs, groups_of(*batch, window, others)
    runs, groups = kept[window, bool(made)]
    attention = functools.partial(
        scaled_dot_product_attention, scale=options.get("scaling"), enable_gqa=options.get("enable_gqa", False)
    )
    for run in runs:
        parts = (run.of(tokens).transpose(1, 2) for tokens in (query, *made))
        run.of(output).copy_(attention(*parts, is_causal=True).transpose(1, 2))
    for group in groups:
        keys, values = (cache[group.cached].transpose(1, 2).to(query.dtype) for cache in (k_cache, v_cache))
        queries = query[group.queries].transpose(1, 2)
        out = attention(queries, keys, values, attn_mask=group.mask, is_causal=group.causal)
        output[group.queries] = out.transpose(1, 2)
    return output
