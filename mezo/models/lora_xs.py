"""LoRA-XS: an r by r matrix between two factors of each weight that stay (Balazy et al. 2024, arXiv 2405.17604).

W + lora_alpha / r B R A with A = S V and B = U from the truncated singular value decomposition U S V of W: what is
trained, R, has r * r elements whatever the size of the weight, and the variance of an estimate grows with their number.
A calibrated A has the directions of what a layer is given instead, each as large as the others.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from mezo.config import LoraXS
from mezo.errors import UserError
from mezo.models import lora
from mezo.models.calibration import Pass, seen_by
from mezo.models.quantization import plain_weight
from mezo.models.spec import CORE
from mezo.models.tuning import Attached, Base, Calibration
from mezo_kernels import canonical_name, lora_init

BESIDE, ITERATIONS = 16, 8  # of the randomised decomposition: vectors beyond the r wanted, and power iterations


class Factors(nn.Sequential):
    """B R in the place of lora_B: the product R x first, which is small.

    Args:
        b: (outputs, r), frozen.
    """

    def __init__(self, b: torch.Tensor):
        outputs, r = b.shape
        core, frozen = (nn.Linear(r, n, bias=False, dtype=b.dtype, device=b.device) for n in (r, outputs))
        core.weight.data.zero_()
        frozen.weight.data.copy_(b)
        super().__init__(core, frozen)

    @property
    def weight(self) -> torch.Tensor:
        """lora_B as others see it."""
        core, frozen = self
        return frozen.weight @ core.weight


def attach(tuning: LoraXS, base: Base) -> Attached:
    """The base with a LoRA adapter whose lora_B is B R, R zero.

    Raises:
        UserError: there are no such layers or linear modules, or a weight has not as many singular vectors.
    """
    whole = lora.attach(tuning, base)
    params, frozen, adapted = {}, {}, {}
    for path, module in list(whole.model.named_modules()):
        if not isinstance(module, LoraLayer):
            continue
        name = canonical_name(path)
        adapted[name] = module, isinstance(module.get_base_layer(), Conv1D)
        a, b = _factors(_weight_of(*adapted[name]), tuning.r, name)
        module.lora_A["default"].weight.data.copy_(a)
        module.lora_B["default"] = factors = Factors(b.to(base.model.dtype).to(base.model.device))
        core, outer = factors
        params[f"{name}.{CORE}"] = core.weight
        frozen |= {f"{name}.lora_A.weight": module.lora_A["default"].weight, f"{name}.lora_B.weight": outer.weight}
    factors = {name: p.detach().float().cpu() for name, p in frozen.items()}
    shapes = {name: tuple(p.shape) for name, p in params.items()}

    def calibrate(passes: Sequence[Pass]) -> None:
        layers = {name: module.get_base_layer() for name, (module, _) in adapted.items()}
        for name, seen in seen_by(layers, tuning.r, passes).items():
            factors[f"{name}.lora_A.weight"] = (seen.directions * (seen.output / tuning.r)).cpu()

    def initial(seed: int) -> dict[str, torch.Tensor]:
        return factors | {name: torch.zeros(shape) for name, shape in shapes.items()}

    return Attached(
        whole.model,
        params,
        whole.peft,
        "parameters of LoRA-XS",
        _noise,
        initial,
        frozen=frozen,
        calibration=Calibration(tuning.calibration_examples, calibrate) if tuning.lora_a == "calibrated" else None,
    )


def _weight_of(module: LoraLayer, transposed: bool) -> torch.Tensor:
    """(outputs, inputs) of the linear layer that an adapter is beside."""
    weight = plain_weight(module.get_base_layer())
    return weight.T if transposed else weight


def _factors(weight: torch.Tensor, r: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(S V, U) of the r largest singular values of a weight, float32."""
    if r > min(weight.shape):
        raise UserError(f"--tuning lora-xs: {name} is {tuple(weight.shape)}, it has no {r} singular vectors; lower --r")
    devices = [weight.device] if weight.device.type != "cpu" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(weight.detach().float(), min(r + BESIDE, *weight.shape), niter=ITERATIONS)
    return s[:r, None] * v[:, :r].T, u[:, :r]


def _noise(theta: Mapping[str, torch.Tensor], seed: int) -> Iterator[torch.Tensor]:
    return (lora_init(seed, name, tuple(tensor.shape)) for name, tensor in theta.items())
