"""LoRA of which lora_B alone is trained: half of the parameters, and the estimate is linear in what they do."""

from collections.abc import Sequence

import torch
from peft.tuners.lora import LoraLayer

from mezo.config import LoraB
from mezo.models import lora
from mezo.models.calibration import Pass, seen_by
from mezo.models.tuning import Attached, Base, Calibration
from mezo_kernels import canonical_name, lora_init

START = 0  # seed of the lora_A that the proof at the start of a run scores with


def attach(tuning: LoraB, base: Base) -> Attached:
    """The base with a LoRA adapter whose lora_A stays as the run's seed draws it, or as a calibration batch gives it.

    lora_B starts from zero. A calibrated lora_A is scaled so that lora_B of normal numbers gives what is as large as
    what the layer gives itself.

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
    calibrated: dict[str, torch.Tensor] = {}

    def calibrate(passes: Sequence[Pass]) -> None:
        modules = whole.model.named_modules()
        layers = {canonical_name(path): m.get_base_layer() for path, m in modules if isinstance(m, LoraLayer)}
        for name, seen in seen_by(layers, tuning.r, passes).items():
            outputs, r = shapes[f"{name}.lora_B.weight"]
            calibrated[f"{name}.lora_A.weight"] = (seen.directions * (seen.output / (outputs * r) ** 0.5)).cpu()

    def initial(seed: int) -> dict[str, torch.Tensor]:
        drawn = lambda name: calibrated[name] if calibrated else lora_init(seed, name, shapes[name])  # noqa: E731
        return {n: drawn(n) if is_frozen(n) else torch.zeros(shape) for n, shape in shapes.items()}

    return Attached(
        whole.model,
        params,
        whole.peft,
        "parameters of lora_B",
        whole.noise,
        initial,
        frozen=frozen,
        calibration=Calibration(tuning.calibration_examples, calibrate) if tuning.lora_a == "calibrated" else None,
    )
