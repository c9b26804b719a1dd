"""What may be reused: which keys and values no adapted weight can change, and which prefixes requests share."""

import re
from collections.abc import Iterable, Sequence

# adapted modules of a layer that leave its keys and values alone
KV_FREE = {"q_proj", "query", "o_proj", "out_proj", "dense", "gate_proj", "up_proj", "down_proj",
           "fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h"}  # fmt: skip
HEAD = "lm_head"
MIN_SHARED = 8  # tokens that a warm-up must save for each request it serves, to be worth a request of its own


def why_kv_depends(names: Iterable[str], n_layers: int) -> str | None:
    """The first trained parameter that changes a key or value, with the reason; None if there is none.

    Keys and values of layer l follow from the layers below and from l's own key and value projections: they are the
    same under every theta only if no layer but the last is adapted, and its keys and values are not.

    >>> why_kv_depends(["model.layers.1.self_attn.q_proj.lora_A.weight"], 2) is None
    True
    >>> why_kv_depends(["model.layers.0.mlp.up_proj.lora_A.weight"], 2)
    'model.layers.0.mlp.up_proj.lora_A.weight lies below the last layer, 1'
    """
    for name in names:
        layer, leaf = layer_of(name), module_of(name).rsplit(".", 1)[-1]
        if layer is None and leaf == HEAD:
            continue  # it comes after every key and value
        if layer != n_layers - 1:
            return f"{name} lies below the last layer, {n_layers - 1}"
        if leaf not in KV_FREE:
            return f"{name} may change keys or values of its layer"
    return None


def layer_of(name: str) -> int | None:
    """Index of the layer that a parameter is in.

    >>> layer_of("base_model.model.model.layers.29.mlp.up_proj.lora_B.weight")
    29
    """
    found = re.search(r"\.(?:layers?|h|blocks)\.(\d+)\.", name)
    return int(found.group(1)) if found else None


def module_of(name: str) -> str:
    """Path of the module that a LoRA parameter adapts, as the base model names it.

    >>> module_of("base_model.model.model.layers.29.mlp.up_proj.lora_B.weight")
    'model.layers.29.mlp.up_proj'
    """
    return name.removeprefix("base_model.model.").split(".lora_")[0]


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
