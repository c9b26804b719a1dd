"""SGLang's attention on a CPU, with requests of like length in one call; its own runs one call a request (0.5.23).

It also works out queries for the whole of a request whose keys and values are cached but for the last token, and throws
them away. Here a request has the queries of its new tokens alone. Where encoders are involved the engine's own runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

from mezo.runtimes.rows import by_length

if TYPE_CHECKING:
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

CALL = 64  # tokens of keys and values whose time one more call takes


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


def groups_of(
    req_to_token: torch.Tensor, requests: torch.Tensor, lengths: torch.Tensor, new: torch.Tensor, window: int | None
) -> list[Group]:
    """Requests with as many new tokens and nearly as many cached ones, together.

    Args:
        req_to_token: (any, longest) place in the cache of each token of a request.
        requests: (requests,) their rows there.
        lengths: (requests,) tokens, the new ones included.
        new: (requests,) new tokens, which the batch has one request after the other.
        window: how many tokens back each sees, None for all.
    """
    total, fresh = lengths.tolist(), new.tolist()
    begins = (new.cumsum(0) - new).tolist()
    groups = []
    for count in sorted(set(fresh)):
        some = [i for i, n in enumerate(fresh) if n == count]
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
    return _attend(backend, query, output, k_cache, v_cache, (req_to_token, requests, lengths, new), options)


def _attend(
    backend: "TorchNativeAttnBackend",
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: tuple[torch.Tensor, ...],
    options: dict,
) -> torch.Tensor:
    """Attention of every group, written to `output`."""
    window = options.get("sliding_window_size")
    window = None if window is None or window < 0 else window
    kept = backend.__dict__.setdefault("mezo_groups", {})
    if window not in kept:
        kept[window] = groups_of(*batch, window)
    for group in kept[window]:
        keys, values = (cache[group.cached].transpose(1, 2).to(query.dtype) for cache in (k_cache, v_cache))
        out = scaled_dot_product_attention(
            query[group.queries].transpose(1, 2),
            keys,
            values,
            attn_mask=group.mask,
            is_causal=group.causal,
            scale=options.get("scaling"),
            enable_gqa=options.get("enable_gqa", False),
        )
        output[group.queries] = out.transpose(1, 2)
    return output
