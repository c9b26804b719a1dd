"""LoRA of which lora_B alone is trained: half of the parameters, and the estimate is linear in what they do."""

import torch

from mezo.config import LoraB
from mezo.models import lora
from mezo.models.tuning import Attached, Base
from mezo_kernels import lora_init

START = 0  # seed of the lora_A that the proof at the start of a run scores with


def attach(tuning: LoraB, base: Base) -> Attached:
    """The base with a LoRA adapter whose lora_A stays as the run's seed draws it; lora_B starts from zero.

    Raises:
        UserError: there are no such layers or linear modules.
    """
    whole = lora.attach(tuning, base)
    is_frozen = lambda name: name.endswith("lora_A.weight")  # noqa: E731
    params = {name: p for name, p in whole.params.items() if not is_frozen(name)}
    frozen = {name: p for name, p in whole.params.items() if is_frozen(name)}
    shapes = {name: tuple(p.shape) for name, p in whole.params.items()}
    for name, p in frozen.items():
        p.data.copy_(lora_init(START, name, shapes[name]))

    def initial(seed: int) -> dict[str, torch.Tensor]:
        return {n: lora_init(seed, n, shape) if is_frozen(n) else torch.zeros(shape) for n, shape in shapes.items()}

    return Attached(whole.model, params, whole.peft, "parameters of lora_B", whole.noise, initial, frozen=frozen)
