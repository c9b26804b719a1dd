"""How tests reach into an engine that the trainer started: damage to find, and guards to lift. Not part of the product.

Inert unless MEZO_TEST_HOOKS is set.
"""

import os


def activate():
    """Called by SGLang at the start of each of its processes."""
    if not os.environ.get("MEZO_TEST_HOOKS"):
        return
    from mezo.runtimes.sglang.inside.handshake import started_by_trainer

    if not started_by_trainer():
        return
    from mezo.runtimes.sglang.inside import worker

    for function in (test_begin, test_fail, test_flip, test_evict, test_draw):
        setattr(worker.Worker, function.__name__, function)


def test_begin(worker, unguarded):
    """Forget the slots of the last runtime; say whether adapters that change keys or values may share a cache."""
    from mezo.models.families import why_kv_depends
    from mezo.runtimes.sglang.inside import worker as module

    worker.ids = {}
    module.why_kv_depends = (lambda *arguments: None) if unguarded else why_kv_depends
    return {}


def test_fail(worker, rank):
    """Fail on one rank."""
    if worker.rank == rank:
        raise ValueError("told to fail")
    return {}


def test_flip(worker, rank, what, name, index):
    """Flip the lowest bit of an element of theta, or of a slot, on one rank."""
    import torch

    if worker.rank == rank:
        layouts = {"theta": worker.theta.master, "plus": worker.theta.pairs[0][0], "minus": worker.theta.pairs[0][1]}
        layout = layouts[what]
        tensor = layout.tensors[layout.names.index(name)]
        row, column = divmod(index, tensor.shape[1])
        tensor.view(torch.int32)[row, column] ^= 1
    return {}


def test_evict(worker, name):
    """Make the engine drop an adapter from the pool and load it again from its own copy."""
    worker.manager.memory_pool.remove_lora(worker.ids[name])
    worker.manager.fetch_new_loras({worker.ids[name]})
    return {}


def test_draw(worker, path, seed):
    """Write z of this rank's shard, drawn as the op draws it: theta = 0, then theta + 1 z."""
    import torch
    from safetensors.torch import save_file

    from mezo_kernels import perturb_

    drawn = worker.theta.master.like([torch.zeros_like(t) for t in worker.theta.master.tensors])
    perturb_(drawn, 1.0, seed)
    save_file(dict(zip(drawn.names, drawn.tensors, strict=True)), f"{path}.{worker.rank}")
    starts = {n: [s.row_start, s.col_start, *s.full_shape] for n, s in worker.shards.items()}
    return {"starts": starts}
