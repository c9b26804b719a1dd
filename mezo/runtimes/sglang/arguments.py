"""From a run's configuration to the arguments of `sglang.Engine`, and what is refused before anything starts."""

import difflib
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from packaging.version import Version

from mezo.atomic import replacing
from mezo.config import Machine, Model, SGLang, Workload
from mezo.config.machine import engine_argument
from mezo.errors import UserError
from mezo.models.families import complete_fields, complete_stacks
from mezo.models.linear import Product, choose, why_not_by, width_of
from mezo.models.load import Checkpoint
from mezo.models.spec import TrainedSpec
from mezo.runtimes.rows import Row, most_rows, most_tokens
from mezo.runtimes.sglang.engine import PATIENCE, accelerated, blackwell
from mezo.runtimes.sglang.scratch import Scratch
from mezo.runtimes.sglang.support import field_types, value_of
from mezo_kernels import available_backends

OLDEST = "0.5.23"
MAX_CALL_TOKENS = 16384  # of a forward pass on a GPU
MAX_PAIRS = 32  # perturbations held at once, unless max_loras_per_batch says otherwise
OWN = {  # arguments that an option of ours decides
    "model_path": "--model", "model": "--model", "tp_size": "--tp", "tp": "--tp", "dtype": "--dtype",
    "disable_radix_cache": "--radix off", "enable_deterministic_inference": "--deterministic",
    "lora_paths": "--r, --target-modules", "max_lora_rank": "--r", "lora_target_modules": "--target-modules",
    "trust_remote_code": "--trust-remote-code", "enable_lora": "--r", "device": "the machine", "random_seed": "--seed",
    "disable_cuda_graph": "--engine-graphs", "disable_decode_cuda_graph": "--engine-graphs",
    "disable_prefill_cuda_graph": "--engine-graphs",
}  # fmt: skip
FIXED = {  # arguments with one value under which what is written to adapter slots is what a forward pass reads
    "disable_overlap_schedule": (True, "slots are written between forward passes, and with overlap two are under way"),
    "enable_tf32_matmul": (False, "it rounds float32 products to 10 bits, which the difference of two losses shows"),
}
ONE = {  # what is proven: one replica, whose ranks hold all layers
    "dp_size": "every replica of the model would have to be updated",
    "attn_dp_size": "every replica of the model would have to be updated",
    "pp_size": "a stage holds some of the layers only",
}


def check_version() -> None:
    """Raise UserError if the SGLang at hand is older than what this runtime has been tested on."""
    installed = version("sglang")
    if Version(installed) < Version(OLDEST):
        raise UserError(f"--runtime sglang: SGLang {installed} is installed, {OLDEST} or later is needed; upgrade it")


def engine_options(runtime: SGLang) -> dict:
    """--engine-arg key=value ..., parsed and checked.

    Raises:
        UserError: no such argument, one that belongs to an option of ours, one under which slots cannot be written,
            or more than one replica.
    """
    if runtime.engine_graphs != "off" and not accelerated():
        raise UserError(f"--engine-graphs {runtime.engine_graphs}: a CPU has no CUDA graphs: leave it out")
    options = {}
    for text in runtime.engine_arg:
        key, value = engine_argument(text)
        if "=" not in text or not key:
            raise UserError(f"--engine-arg must be key=value, got {text!r}")
        if key in OWN:
            raise UserError(f"--engine-arg {key} is decided by {OWN[key]}: use that")
        if key not in field_types():
            near = difflib.get_close_matches(key, field_types(), n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise UserError(f"--engine-arg {key}: SGLang's engine has no such argument{hint}")
        options[key] = value_of(key, value)
        if key in FIXED and options[key] != FIXED[key][0]:
            raise UserError(f"--engine-arg {key}={value}: {FIXED[key][1]}: leave it out")
        if key in ONE and options[key] != 1:
            raise UserError(f"--engine-arg {key}={value}: {ONE[key]}; use --tp, or torchrun with an engine a process")
    _check_nodes(runtime.tp, options)
    return options


def _check_nodes(tp: int, options: dict) -> None:
    """Raise UserError if several machines are asked for in a way that they could not find each other."""
    nodes, node = options.get("nnodes", 1), options.get("node_rank", 0)
    if not 0 <= node < nodes:
        raise UserError(f"--engine-arg node_rank must be from 0 to nnodes - 1, got node_rank={node} nnodes={nodes}")
    if tp % nodes:
        raise UserError(f"--tp {tp} cannot be divided among nnodes={nodes}: use a multiple of it")
    if nodes > 1 and not options.get("dist_init_addr"):
        raise UserError(
            "--engine-arg nnodes: give dist_init_addr=HOST:PORT, an address of the first machine that all reach"
        )


def check_heads(tp: int, checkpoint: Checkpoint) -> None:
    """Raise UserError if a model's heads or MLP cannot be divided by --tp."""
    if tp == 1:
        return
    name, model = checkpoint.name, checkpoint.config
    heads = model.num_attention_heads
    kv = getattr(model, "num_key_value_heads", None) or heads
    for what, n in (("attention heads", heads), ("MLP columns", getattr(model, "intermediate_size", tp))):
        if n % tp:
            raise UserError(f"--tp {tp}: {name} has {n} {what}, which {tp} ranks cannot share")
    if kv % tp and (tp % kv or not accelerated()):  # a GPU's ranks may hold copies; on a CPU SGLang adds empty heads
        raise UserError(f"--tp {tp}: {name} has {kv} key-value heads, which {tp} ranks cannot share")


def pairs_of(perturbations: int, options: dict) -> int:
    """Perturbations whose two signs are resident at once: all of a step's, as far as the engine's slots go."""
    if "max_loras_per_batch" in options:
        slots = options["max_loras_per_batch"]
        if slots < 3:
            raise UserError(
                f"--engine-arg max_loras_per_batch must be at least 3 (both signs and the base), got {slots}"
            )
        return min(perturbations, (slots - 1) // 2)
    return min(perturbations, MAX_PAIRS)


def check_device(device: str) -> None:
    """Raise UserError if --device asks for another device than the one SGLang takes."""
    taken = "cuda" if accelerated() else "cpu"
    if device not in ("auto", taken):
        raise UserError(f"--device {device}: SGLang runs on {taken} here; use --device auto, or CUDA_VISIBLE_DEVICES")


def call_tokens(tokens: int) -> int:
    """Tokens that one forward pass of the engine may have, for a largest call of `tokens`.

    On a GPU the engine sets memory aside by this number: larger calls are divided by examples, both signs together.
    """
    rounded = -(-max(8192, tokens) // 128) * 128  # a multiple of every page size
    return min(rounded, MAX_CALL_TOKENS) if accelerated() else rounded


def largest_call(machine: Machine, work: Workload, rows: dict[str, Sequence[list[Row]]], pairs: int) -> tuple[int, int]:
    """Requests, and tokens, of the largest batch that training or evaluation may ask for.

    Args:
        machine: how many examples a forward pass has.
        work: what the run asks for.
        rows: of each split's examples, each a list.
        pairs: perturbations held at once.
    """
    group = work.batch_size // work.directions  # examples that a perturbation is measured on
    sizes = {"train": 2 * pairs * min(machine.micro_batch_size or group, group)}
    evaluated = machine.eval_batch_size or work.batch_size
    requests, tokens, new = 1, 1, work.max_new_tokens
    for split, nested in rows.items():
        copies = max(sizes.get(split, 1), evaluated)
        requests = max(requests, copies * most_rows(nested))
        tokens = max(tokens, copies * (new + most_tokens(nested)))
    return requests, tokens


def refuse_small_limits(options: dict, call: int, row: int) -> None:
    """Raise UserError if a limit that the user gives the engine is below what a step needs.

    Args:
        options: --engine-arg.
        call: tokens of the largest batch of requests.
        row: tokens of the longest request, with those it generates and one more, whose place the engine keeps.
    """
    for key, needed, instead in (
        ("max_total_tokens", call, "--micro-batch-size or --eval-batch-size"),
        ("max_prefill_tokens", call, "--micro-batch-size or --eval-batch-size"),
        ("context_length", row, "--max-length"),
    ):
        if (options.get(key) or needed) < needed:
            given = f"--engine-arg {key}={options[key]}"
            raise UserError(f"{given}: this run needs {needed}: raise it, leave it out, or lower {instead}")


def engine_arguments(
    runtime: SGLang,
    seed: int,
    options: dict,
    dtype: str,
    spec: TrainedSpec,
    adapters: list[dict],
    tokens: int,
    resident: int,
    requests: int,
) -> dict:
    """Arguments of `sglang.Engine`.

    Args:
        runtime: the options of the engine.
        seed: of the run.
        options: the user's own, which win.
        dtype: of the base model.
        spec: what is trained.
        adapters: the engine's `lora_paths`.
        tokens: that one call may compute.
        resident: tokens that the KV cache should keep beside.
        requests: of the largest call.
    """
    arguments = {
        "model_path": spec.model,
        "dtype": dtype,
        "tp_size": runtime.tp,
        "lora_paths": adapters,
        "max_loras_per_batch": len(adapters) + 1,
        "max_lora_rank": spec.peft["r"],
        "random_seed": seed % 2**31,
        "schedule_policy": "fcfs",
        "disable_radix_cache": runtime.radix == "off",
        "disable_overlap_schedule": True,  # nothing is decoded, and slots change between forward passes
        "max_running_requests": max(64, requests),  # a call is one forward pass
        "skip_server_warmup": True,
        "watchdog_timeout": PATIENCE,  # a call is one forward pass, which on a CPU may take minutes
        "log_level": "error",
    }
    if dtype != "float32":
        arguments["enable_fp32_lm_head"] = True  # 16-bit logits near 20 come in steps of an eighth
    if runtime.engine_graphs == "off":
        arguments["disable_cuda_graph"] = True
    elif runtime.engine_graphs != "all":
        other = {"decode": "prefill", "prefill": "decode"}[runtime.engine_graphs]
        arguments[f"disable_{other}_cuda_graph"] = True
    if runtime.deterministic:
        arguments["enable_deterministic_inference"] = True
        if runtime.radix == "auto" and blackwell():  # the engine's own choice there turns its radix cache off
            arguments["attention_backend"] = "triton"
    if accelerated():
        # under torchrun every rank drives an engine of its own; a call is one forward pass, both signs of it alike
        arguments |= {
            "base_gpu_id": int(os.environ.get("LOCAL_RANK", "0")) * runtime.tp,
            "chunked_prefill_size": tokens,
            "max_prefill_tokens": tokens,
        }
    else:
        arguments |= {
            "device": "cpu",
            "sleep_on_idle": True,  # else an engine that waits for the trainer keeps a core busy with asking
            "attention_backend": "torch_native",
            "sampling_backend": "pytorch",
            "grammar_backend": "none",
            "lora_backend": "torch_native",
            "mem_fraction_static": 0.8,  # SGLang has a guess for GPUs alone; max_total_tokens is the limit here
            "chunked_prefill_size": -1,
            "max_prefill_tokens": tokens,
            "max_total_tokens": tokens + resident,
        }
    return arguments | options


def placeholder_of(
    options: dict, spec: TrainedSpec, checkpoint: Checkpoint
) -> tuple[dict[str, torch.Tensor], tuple[Path, ...]]:
    """The adapter of zeros that reserves slots, and the folder beside the engine's own in which it has to be, if any.

    Members of a stack that are not trained stay zero for good. The machines of one engine know adapters by path: it
    must be the same on all, which the path of a process's own folder is not.

    Args:
        options: --engine-arg.
        spec: what is trained.
        checkpoint: of the base model.
    """
    zeros = complete_stacks(checkpoint.config, {name: torch.zeros(shape) for name, shape in spec.adapter.items()})
    if options.get("nnodes", 1) == 1:
        return zeros, ()
    facts = json.dumps([options["dist_init_addr"], spec.peft, spec.adapter], sort_keys=True)
    name = f"mezo-placeholder-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"
    return zeros, (Path(tempfile.gettempdir()) / name,)


def write_placeholders(
    scratch: Scratch, zeros: dict[str, torch.Tensor], beside: tuple[Path, ...], spec: TrainedSpec, slots: list[str]
) -> list[dict]:
    """Adapters that reserve slots; return the engine's `lora_paths`.

    Args:
        scratch: of the engine.
        zeros, beside: see `placeholder_of`.
        spec: what is trained.
        slots: their names.
    """
    directory = beside[0] if beside else scratch.path / "placeholder"
    directory.mkdir(exist_ok=True)
    # two processes of one machine may do so at once
    with replacing(directory / "adapter_model.safetensors") as part:
        scratch.save(zeros, part, {"format": "pt"})
    with replacing(directory / "adapter_config.json") as part:
        part.write_text(json.dumps(complete_fields(spec.peft, zeros)))
    return [{"lora_name": name, "lora_path": str(directory), "pinned": True} for name in slots]


def product_of(runtime: SGLang, checkpoint: Checkpoint, dtype: torch.dtype, quantised: bool) -> Product:
    """What multiplies by the frozen weights of the engine on a CPU, as --linear says or a trial decides.

    Args:
        runtime: with its option.
        checkpoint: of the base.
        dtype: of the base.
        quantised: its weights are, and are left alone.
    Raises:
        UserError: what was asked for cannot be.
    """
    if runtime.linear == "onednn":
        raise UserError(
            "--linear onednn: the engine's weights are frozen, and packed or not; use packed or --runtime hf"
        )
    if accelerated() or quantised:
        if runtime.linear == "packed":
            why = "quantised weights are multiplied by" if quantised else "weights are packed on a CPU alone"
            raise UserError(f"--linear packed: {why}; leave it out")
        return Product("torch", "products are the engine's own")
    return choose(runtime.linear, width_of(checkpoint.config), dtype, torch.device("cpu"))


def has_product(name: str, model: Model, machine: Machine) -> bool:
    """Whether the engine's products can be computed so here, see --linear."""
    if name != "packed" or accelerated():
        return name == "torch"
    dtype = getattr(torch, model.dtype) if model.dtype != "auto" else default_dtype()
    return why_not_by(name, dtype, torch.device("cpu")) is None


def default_dtype() -> torch.dtype:
    """Of the base model under --dtype auto."""
    return torch.bfloat16 if accelerated() else torch.float32


def backend_of(name: str) -> str | None:
    """The fused ops' backend that --backend names, None for auto. Raises UserError if it does not run here."""
    available = available_backends("cuda" if accelerated() else "cpu")
    if name != "auto" and name not in available:
        raise UserError(f"--backend {name} does not run here; available: {', '.join(available)}")
    return None if name == "auto" else name
