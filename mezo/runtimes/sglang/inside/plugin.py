"""The SGLang plugin (entry-point group sglang.srt.plugins): puts MeZO's state into the engine's scheduler processes.

It does nothing unless a trainer started the engine; `handshake.py` has how that is known.
"""

import functools
import importlib
import os
import signal
from collections.abc import Callable
from types import ModuleType

from mezo.runtimes.sglang.inside.handshake import started_by_trainer

WITHOUT = "MEZO_ENGINE_WITHOUT"
"""Environment variable: what an engine on a CPU leaves to SGLang's own code, of attention and lora, a comma between.
`bench/engine.py` compares by it."""


def activate() -> None:
    """Called by SGLang at the start of each of its processes."""
    if not started_by_trainer():
        return
    without = os.environ.get(WITHOUT, "").split(",")
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from mezo.runtimes.sglang.inside import attention, head, linear, lora, sampling, worker

    managers, pool = "sglang.srt.managers", "sglang.srt.lora.mem_pool.LoRAMemoryPool"
    HookRegistry.register(f"{managers}.scheduler.Scheduler.handle_rpc_request", worker.answer, HookType.AROUND)
    HookRegistry.register(f"{managers}.scheduler.Scheduler.run_batch", worker.see_pass, HookType.AFTER)
    HookRegistry.register(f"{managers}.scheduler.Scheduler.run_batch", sampling.see_batch, HookType.BEFORE)
    sampler = "sglang.srt.layers.sampler.Sampler._sample_from_probs"
    HookRegistry.register(sampler, sampling.sample, HookType.AROUND)
    HookRegistry.register(f"{managers}.schedule_batch.Req.__init__", worker.see_request, HookType.AFTER)
    HookRegistry.register(f"{pool}.load_lora_weight_to_buffer", worker.see_load, HookType.AFTER)
    backend = "sglang.srt.lora.backend.torch_backend.TorchNativeLoRABackend"
    HookRegistry.register(f"{backend}.prepare_lora_batch", head.prune, HookType.AFTER)
    for factor in "ab":
        HookRegistry.register(f"{backend}.run_lora_{factor}_sgemm", head.use_pruned, HookType.AROUND)
    if "lora" not in without:
        products = "sglang.srt.lora.torch_ops"
        HookRegistry.register(f"{products}.sgemm_lora_a_fwd", lora.shrink, HookType.AROUND)
        HookRegistry.register(f"{products}.sgemm_lora_b_fwd", lora.expand, HookType.AROUND)
    manager = "sglang.srt.lora.lora_manager.LoRAManager"
    HookRegistry.register(f"{manager}.prepare_lora_batch", head.divide, HookType.AFTER)
    logits = "sglang.srt.layers.logits_processor.LogitsProcessor._compute_lm_head"
    HookRegistry.register(logits, head.in_float32, HookType.AROUND)
    HookRegistry.register(logits, linear.head, HookType.AROUND)
    if "attention" not in without:
        native = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
        HookRegistry.register(f"{native}.init_forward_metadata", attention.forget, HookType.AFTER)
        HookRegistry.register(f"{native}.forward_extend", attention.see_made, HookType.BEFORE)
        HookRegistry.register(f"{native}._run_sdpa_forward_extend", attention.extend, HookType.AROUND)
        HookRegistry.register(f"{native}._run_sdpa_forward_decode", attention.decode, HookType.AROUND)
    _allow_kernels_without_accelerator()
    # Ctrl-C in a terminal reaches every process of the group: the trainer alone decides when to stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _allow_kernels_without_accelerator() -> None:
    """Without an accelerator memory cannot be pinned, and SGLang's LoRA modules ask for it unconditionally.

    csgmv asks for sizes tuned for the device by its name too, and a CPU has none.
    """
    import torch

    if torch.accelerator.is_available():
        return
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    for module in ("layers", "backend.torch_backend", "backend.triton_backend", "backend.chunked_backend"):
        importlib.import_module(f"sglang.srt.lora.{module}").torch = _UnpinnedTorch(torch)
    tuning = importlib.import_module("sglang.kernels.ops.lora.dense.lora_tuning_config")
    tuning.get_device_name = lambda: "CPU"


class _UnpinnedTorch:
    """`torch` as those modules see it: factory functions that ignore pin_memory. Nobody else's torch is changed."""

    def __init__(self, torch: ModuleType):
        self._torch = torch
        for name in ("tensor", "zeros", "empty", "arange", "full", "ones"):
            setattr(self, name, _without_pin_memory(getattr(torch, name)))

    def __getattr__(self, name: str) -> object:
        return getattr(self._torch, name)


def _without_pin_memory(function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args, pin_memory=False, **kwargs):
        return function(*args, **kwargs)

    return call
