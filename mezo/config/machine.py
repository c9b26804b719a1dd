"""Where and how a run is computed, and where it is written."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge

from mezo.config.options import REQUIRED, RESUMABLE, Choice
from mezo.ranges import NotNegative


@dataclass(frozen=True)
class HF:
    """transformers and PEFT in this process."""

    name: ClassVar[str] = "hf"
    summary: ClassVar[str] = "transformers and PEFT in this process; on CPU and GPU"

    trunk_cache: Annotated[Literal["auto", "off", "cpu", "device"], RESUMABLE] = "auto"
    """Where to keep the hidden states below the lowest trained layer, which training does not change; auto keeps them
    wherever the result is the same to the bit, on a CPU in its memory, on a GPU in the GPU's."""
    trunk_cache_bytes: Annotated[int, Ge(1), RESUMABLE] = 4 << 30
    """Most bytes of these hidden states; the least recently used ones go first."""
    copies_bytes: Annotated[int, Ge(1), RESUMABLE] = 2 << 30
    """Most bytes of perturbed copies of the trained parameters that --directions holds at once; where those of a step
    do not fit, it takes several forward passes."""
    linear: Annotated[Literal["auto", "torch", "onednn", "packed"], RESUMABLE] = "auto"
    """What multiplies by the weights on a CPU. torch: torch's own product. onednn: that of oneDNN, as exact. packed: it
    too, by frozen weights laid out for it once. auto: the faster here, by a short trial; packed where there are frozen
    weights, onednn under --tuning full. A resumed run keeps what it began with."""


@dataclass(frozen=True)
class SGLang:
    """Engine: SGLang, which scores many requests at once."""

    name: ClassVar[str] = "sglang"
    summary: ClassVar[str] = "the SGLang engine, made for GPUs; LoRA on decoders"

    tp: Annotated[int, Ge(1), RESUMABLE] = 1
    """GPUs that share each layer of the model (tensor parallelism)."""
    radix: Annotated[Literal["auto", "off"], RESUMABLE] = "auto"
    """auto: reuse keys and values of text seen before wherever that is exact; off: never."""
    deterministic: Annotated[bool, RESUMABLE] = False
    """The engine's deterministic mode, where its attention backend has one."""
    linear: Annotated[Literal["auto", "torch", "onednn", "packed"], RESUMABLE] = "auto"
    """See --runtime hf; here frozen weights are packed or not."""
    engine_graphs: Annotated[Literal["off", "decode", "prefill", "all"], RESUMABLE] = "off"
    """Forward passes that a GPU replays from CUDA graphs: of generated text (decode), of what is scored (prefill)."""
    engine_arg: Annotated[tuple[str, ...], RESUMABLE] = ()
    """Further arguments of the engine, key=value each: attention_backend=triton mem_fraction_static=0.8."""

    @property
    def follows(self) -> bool:
        """True on the second and later machines of an engine: they serve a trainer that runs on the first."""
        return dict(map(engine_argument, self.engine_arg)).get("node_rank", "0") != "0"


RUNTIMES: dict[str, type] = {kind.name: kind for kind in (HF, SGLang)}
"""By the name that `--runtime` takes."""


DASHBOARDS = ("tensorboard", "wandb", "trackio")
"""What `--report-to` takes; they are called as their packages are."""


@dataclass(frozen=True)
class Machine:
    """Machine: where and how the run is computed, and where it is written."""

    output_dir: Annotated[str, REQUIRED] = ""
    """Directory to create for the run: log, adapter, curves; an existing one is never overwritten."""
    device: Annotated[str, RESUMABLE] = "auto"
    """cpu, cuda or cuda:1; auto takes a GPU where there is one."""
    backend: Annotated[Literal["auto", "reference", "numba", "triton"], RESUMABLE] = "auto"
    """What computes perturbations and updates; auto takes the fastest for the device. All give the same bits."""
    micro_batch_size: NotNegative = 0
    """Examples of one forward pass, to save memory; 0 is the whole batch."""
    eval_batch_size: Annotated[int, Ge(0), RESUMABLE] = 0
    """Examples of one forward pass of an evaluation; 0 is --batch-size."""
    parallel: Literal["data", "perturbations"] = "data"
    """What several processes, started by torchrun, share: the examples of a batch, or the perturbations of a step."""
    verify_every: Annotated[int, Ge(-1), RESUMABLE] = 0
    """Steps between checks of the fast kernels against the reference, bit for bit; 0 is a tenth of the run, -1
    never."""
    report_to: Annotated[str, RESUMABLE] = "tensorboard"
    """Where curves go: tensorboard, wandb, trackio, several with commas between, or none. The run's files and its page
    hold them in any case."""
    runtime: Annotated[HF | SGLang, Choice("runtime", RUNTIMES), RESUMABLE] = HF()
    """What computes the losses."""

    @property
    def follows(self) -> bool:
        """See `SGLang.follows`."""
        return isinstance(self.runtime, SGLang) and self.runtime.follows


def dashboards_of(report_to: str) -> list[str]:
    """The dashboards that `--report-to` names.

    >>> dashboards_of("tensorboard, wandb"), dashboards_of("none")
    (['tensorboard', 'wandb'], [])
    """
    names = [name.strip() for name in report_to.split(",")]
    return [] if names == ["none"] else list(dict.fromkeys(names))


def engine_argument(text: str) -> tuple[str, str]:
    """Name and value of one --engine-arg, the name as SGLang's Python interface has it.

    >>> engine_argument("--node-rank=1")
    ('node_rank', '1')
    """
    key, _, value = text.partition("=")
    return key.strip().removeprefix("--").replace("-", "_"), value.strip()
