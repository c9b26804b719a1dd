"""The names that SGLang's CPU engine imports from its kernel package, which has no CPU wheel. No numerics are here.

SGLang computes with its own torch fallbacks; these functions serve speculative decoding and moves of the KV cache,
which the tests do not use. Each raises if it is called after all.
"""

NAMES = (
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
    "verify_tree_greedy_cpu",
)


def _missing(name: str):
    def function(*args, **kwargs):
        raise NotImplementedError(f"{name}: SGLang's kernel package is not installed, only the names that it exports")

    return function


globals().update({name: _missing(name) for name in NAMES})
