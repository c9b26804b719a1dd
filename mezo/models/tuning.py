"""What a tuning is: a function `attach` that takes its options and a base model, and returns that with what is trained.

`lora.py`, `lora_b.py`, `lora_xs.py`, `prefix.py` and `full.py` are one tuning each; `parts.py` has the table of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from mezo.models.attention import Prefix
from mezo.models.calibration import Pass
from mezo.models.load import Checkpoint


@dataclass(frozen=True)
class Base:
    """A loaded base model taken apart, with nothing attached to it.

    Args:
        checkpoint: where it comes from.
        model: with its head.
        body: the transformer without its head; of a model that reads images too, its part for text.
        layers: of the body, in order; empty where it has no list of them, one module a layer.
        head: hidden states -> logits; None where that is no single module.
        whole: names of modules that are trained whole beside an adapter: those of a head for classes.
        new: names of the parameters in them that the checkpoint lacks.
    """

    checkpoint: Checkpoint
    model: nn.Module
    body: nn.Module
    layers: Sequence[nn.Module]
    head: nn.Module | None
    whole: tuple[str, ...] = ()
    new: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Calibration:
    """How what is frozen is made of a calibration batch.

    Args:
        examples: of the training set, at most.
        run: takes the passes of their rows through the model, at a theta at which it is the base.
    """

    examples: int
    run: Callable[[Sequence[Pass]], None]


@dataclass(frozen=True)
class Attached:
    """A model with what is trained of it: what the `attach` of every tuning returns.

    Args:
        model: to run.
        params: trained parameters by canonical name.
        peft: fields of adapter_config.json; None where the base model's own parameters are trained.
        title: what the parameters are, for people.
        noise: from a theta and a seed, tensors in the order of `params`: another theta, float32, at which scores are
            others. The proof at the start of a run scores there.
        initial: from the seed of a run theta_0, where the model at hand decides it, and what is frozen; None where a
            log's header says it.
        prefix: keys and values in front of every layer's own, if that is what is trained.
        frozen: parameters that belong to the adapter and are not trained, by canonical name.
        above: names of trained parameters that come after every layer: those of a head for classes.
        calibration: makes what is frozen, which `initial` then gives; None where that needs none.
    """

    model: nn.Module
    params: dict[str, nn.Parameter]
    peft: dict | None
    title: str
    noise: Callable[[Mapping[str, torch.Tensor], int], Iterator[torch.Tensor]]
    initial: Callable[[int], dict[str, torch.Tensor]] | None = None
    prefix: Prefix | None = None
    frozen: dict[str, nn.Parameter] = field(default_factory=dict)
    above: frozenset[str] = frozenset()
    calibration: Calibration | None = None
