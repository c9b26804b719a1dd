"""The GPU day's steps on a random Llama of 1.1B parameters: seconds and memory, beside inference and AdamW."""

import dataclasses
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import rows
import torch
from kept import Kept

MODEL = {
    False: {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    True: {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
}
BATCH = {False: (32, 256), True: (4, 16)}  # sequences and tokens of each
DIRECTIONS = {False: (1, 2, 4, 8, 16, 32), True: (1, 4)}


def llama(rehearse: bool):
    """The model, bfloat16, on the CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**MODEL[rehearse], vocab_size=64 if rehearse else 32000)
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def save(folder: str, rehearse: bool) -> None:
    """Write the model with a tokenizer of one word, which an engine wants to see.

    Args:
        folder: where to.
        rehearse: a tiny one.
    """
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    llama(rehearse).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)


def every_weight(kept: Kept, rehearse: bool) -> None:
    """Forward passes, a step of MeZO and one of AdamW that train every weight, and what memory each takes at most.

    Args:
        kept: where the rows go.
        rehearse: on the CPU, of nothing.
    """
    device = "cpu" if rehearse else "cuda"
    model = llama(rehearse).to(device)
    tokens = torch.randint(model.config.vocab_size, BATCH[rehearse], device=device)

    def loss():
        return model(tokens, labels=tokens, use_cache=False).loss

    @torch.no_grad()
    def forward():
        loss()

    def mezo():
        from mezo import MeZO

        optimizer = MeZO(model.named_parameters(), lr=1e-9, eps=1e-3, seed=0)
        return lambda: optimizer.step(torch.no_grad()(loss))

    def adamw():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)

        def step():
            loss().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    makers = {
        "one forward pass": lambda: forward,
        "two forward passes": lambda: lambda: (forward(), forward()),
        "MeZO, every weight": mezo,
        "AdamW, every weight": adamw,
    }
    for name, make in makers.items():
        kept.once(name, lambda make=make: _measured(make, device))


def adapter(kept: Kept, rehearse: bool) -> None:
    """A step of the hf runtime on an adapter of all layers, with one direction and more for a batch.

    Args:
        kept: where the rows go.
        rehearse: on the CPU, of nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        save(folder, rehearse)
        for m in DIRECTIONS[rehearse]:
            kept.once(f"adapter, {m} directions", lambda m=m: _directions(folder, m, rehearse))


def config_of(folder: str, rehearse: bool, **options):
    """The configuration of a run on the model in a folder.

    Args:
        folder: of the model.
        rehearse: on the CPU, of nothing.
        options: of the run.
    """
    from mezo.config import Config

    return Config.of(
        **{
            "model": folder, "task": "sst2", "output_dir": "unused", "batch_size": BATCH[rehearse][0], "eps": 1e-3,
            "lr": 1e-6, "target_modules": ("q_proj", "v_proj"), "objective": "cross_entropy", "dtype": "bfloat16",
            **options,
        }
    )  # fmt: skip


def examples(rehearse: bool) -> list:
    """A batch of random prompts with two options of one token."""
    from mezo.data.example import Example

    (count, length), draw = BATCH[rehearse], random.Random(0)
    prompts = [tuple(draw.randrange(3, 64) for _ in range(length)) for _ in range(count)]
    return [Example(prompt, ((5,), (9,)), draw.randint(0, 1)) for prompt in prompts]


def _directions(folder: str, m: int, rehearse: bool) -> dict:
    from training_step import OurStep

    from mezo.runtimes.hf.runtime import HFRuntime

    place = {"device": "cpu" if rehearse else "cuda", "trunk_cache": "off"}
    config = config_of(folder, rehearse, directions=m, **place)
    with tempfile.TemporaryDirectory() as log:

        def make():
            return OurStep(HFRuntime(*config.for_runtime), config, examples(rehearse), Path(log) / "log.jsonl")

        return _measured(make, "cpu" if rehearse else "cuda")


def _measured(make: Callable[[], Callable], device: str) -> dict:
    """Median seconds of a call of what `make` gives, and the most memory that it held."""
    run = make()
    run()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(*rows.in_turn([run], device))
    return {"seconds": seconds, "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None}


def engine(kept: Kept, rehearse: bool) -> None:
    """Steps through SGLang's engine: its start and proof, one pair and several, CUDA graphs.

    Args:
        kept: where the rows go.
        rehearse: on the CPU, of nothing.
    """
    dtype = "float32" if rehearse else "bfloat16"
    kinds = {"one pair": {}, "4 pairs": {"num_perturbations": 4}}
    if not rehearse:
        kinds |= {f"graphs {graphs}": {"engine_graphs": graphs} for graphs in ("decode", "prefill", "all")}
    with tempfile.TemporaryDirectory() as folder:
        save(folder, rehearse)
        for name, options in kinds.items():
            config = config_of(folder, rehearse, runtime="sglang", **{"dtype": dtype, **options})
            kept.once(
                f"engine, {name}", lambda config=config: _engine_steps(config, rehearse), needed=name == "one pair"
            )


def _engine_steps(config, rehearse: bool) -> dict:
    """Median seconds of a step and of its parts, tokens, and what the proof at the start found."""
    from training_step import OurStep

    from mezo.runtimes.sglang.runtime import SGLangRuntime

    runtime = SGLangRuntime(*config.for_runtime)
    with tempfile.TemporaryDirectory() as log:
        began = time.perf_counter()
        try:
            step = OurStep(runtime, config, examples(rehearse), Path(log) / "log.jsonl")
            row = {"seconds_of_start": time.perf_counter() - began, "seconds_proving": runtime.seconds_proving}
            step()
            before, count, steps = dict(runtime.seconds), dataclasses.replace(runtime.tokens), 3 if rehearse else 20
            began = time.perf_counter()
            for _ in range(steps):
                step()
            row["seconds"] = (time.perf_counter() - began) / steps
            row["parts"] = {part: (runtime.seconds[part] - before[part]) / steps for part in before}
            row["scored"] = (runtime.tokens.scored - count.scored) / steps
            row["computed"] = (runtime.tokens.computed - count.computed) / steps
        finally:
            runtime.close()
    return row | {"batch_noise": runtime.batch_noise, "divided": runtime.divided}
