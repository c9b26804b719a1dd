"""The products of a model on a CPU: by oneDNN, frozen weights laid out once as it wants them, adapters added in place.

torch's own float32 product is another library's on some CPUs, and slower there. oneDNN multiplies fastest by a weight
in blocks of its own, which a frozen one is put into here, once, by the operations that `torch.compile` calls for frozen
weights. Modules are swapped, the model's code stays. Layers that are given one and the same input (query, key and
value; gate and up) are one product. Where all weights are trained they are taken as they lie, by oneDNN if it is
exact.
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from mezo.errors import UserError
from mezo.models.mapped import give_back, mapped_files
from mezo.progress import say

SMALLEST = 256  # width of a model below which calls cost more than products
WIDEST = 1024  # width that is tried; wider weights take longer to make than to multiply by
ROWS = 64  # tokens of the product that is tried
ROUNDS = 3
WORTH = 1.15  # times as fast that packing must be: less is within what a busy machine varies by
EXACT = 1e-5  # of float32 products, relative to their largest; bfloat16 is off by 4e-3, TensorFloat32 by 5e-4

LIBRARY = {"packed": "oneDNN packed", "onednn": "oneDNN"}

_as_loaded = False
_unpacked: dict[tuple["_Stack", int], torch.Tensor] = {}
"""Weights of one stack, by (stack, place), that layers to be called next will take."""


@contextmanager
def as_loaded() -> Iterator[None]:
    """Meanwhile products are torch's own and adapters PEFT's own, by the same weights: what proofs compare with."""
    global _as_loaded
    before, _as_loaded = _as_loaded, True
    try:
        yield
    finally:
        _as_loaded = before
        _unpacked.clear()  # of a forward pass that failed


class _Stack:
    """Weights of layers with one input, as one packed weight, and what was last computed of them.

    Args:
        weights: (outputs, inputs) each.
    """

    def __init__(self, weights: list[torch.Tensor]):
        self.sizes = [len(weight) for weight in weights]
        self.packed = lay_out(torch.cat(weights))
        self.x: torch.Tensor | None = None
        self.version, self.outputs = -1, {}

    def dense(self, place: int) -> torch.Tensor:
        """One of the weights as it was, to the bit."""
        return self.packed.to_dense().split(self.sizes)[place]

    def dense_in_turn(self, place: int) -> torch.Tensor:
        """The same of layers that are called one after the other: the stack is unpacked once for all of them."""
        if (self, place) not in _unpacked:
            _unpacked.clear()
            _unpacked.update(((self, n), part) for n, part in enumerate(self.packed.to_dense().split(self.sizes)))
        return _unpacked.pop((self, place))

    def product(self, x: torch.Tensor, place: int, bias: torch.Tensor | None) -> torch.Tensor:
        """x times one of the weights; the others' outputs are kept for those that are given the same x next."""
        if len(self.sizes) == 1:
            return packed_product(x, self.packed, bias)
        if self.x is not x or self.version != x._version or place not in self.outputs:
            parts = packed_product(x, self.packed, None).split(self.sizes, -1)
            self.x, self.version, self.outputs = x, x._version, dict(enumerate(parts))
        out = self.outputs.pop(place)
        if not self.outputs:
            self.x = None  # nothing of a forward pass outlives it
        return out if bias is None else out.add_(bias)


class PackedLinear(nn.Linear):
    """A linear layer whose weight is held packed; `weight` unpacks a copy, for whoever reads it.

    Args:
        stack: where its weight is.
        place: of its weight there.
        base: the layer that it stands for, of (inputs, outputs) where that is a `Conv1D`.
    """

    def __init__(self, stack: _Stack, place: int, base: nn.Module):
        nn.Module.__init__(self)
        self.stack, self.place, self.transposed = stack, place, isinstance(base, Conv1D)
        self.in_features, self.out_features = _weight_of(base).shape[::-1]
        self.register_parameter("bias", base.bias)
        self.eval()

    @property
    def weight(self) -> torch.Tensor:
        """As the layer that was packed had it."""
        dense = self.stack.dense(self.place)
        return dense.t() if self.transposed else dense

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See `nn.Linear`; with autograd by torch's own product, since the packed one has no derivative."""
        if _as_loaded or (torch.is_grad_enabled() and x.requires_grad):
            return nn.functional.linear(x, self.stack.dense_in_turn(self.place).to(x.dtype), self.bias)
        return self.stack.product(x, self.place, self.bias)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight


@dataclass(frozen=True)
class Product:
    """What computes the products of a model.

    Args:
        name: "torch", "onednn" or "packed", see --linear.
        why: for people, with what was measured.
    """

    name: str
    why: str


def choose(option: str, width: int, dtype: torch.dtype, device: torch.device, frozen: bool = True) -> Product:
    """What --linear asks for; under "auto" the faster of two here, by a trial of some hundredths of a second.

    Args:
        option: "auto", "torch", "onednn" or "packed".
        width: of the model's hidden states.
        dtype, device: of the base.
        frozen: the base is, and can be packed; else it is taken as it lies.
    Raises:
        UserError: what was asked for cannot be.
    """
    name = str(dtype).removeprefix("torch.")
    if option == "torch":
        return Product("torch", f"{name} products: torch's own")
    asked = option if option != "auto" else "packed" if frozen else "onednn"
    if asked == "packed" and not frozen:
        raise UserError("--linear packed: --tuning full trains every weight, and only frozen ones are packed; use auto")
    refusal = why_not_by(asked, dtype, device)
    if option != "auto":
        if refusal:
            raise UserError(f"--linear {option}: {refusal}; use --linear torch")
        return Product(option, f"{name} products: {LIBRARY[option]}")
    if refusal or width < SMALLEST:
        return Product("torch", f"{name} products: torch's own ({refusal or 'the model is too small to gain'})")
    gain = measured_gain(min(width, WIDEST), dtype, asked)
    if gain < WORTH:
        return Product("torch", f"{name} products: torch's own, {LIBRARY[asked]} is {gain:.2f} times as fast here")
    return Product(asked, f"{name} products: {LIBRARY[asked]}, {gain:.2f} times as fast as torch's own here")


def why_not_by(product: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why oneDNN does not compute the products of a dtype on a device, None if it can, and exactly.

    Args:
        product: "onednn" or "packed".
        dtype, device: of the weights.
    """
    if product == "onednn" and dtype == torch.bfloat16:
        return "torch's own bfloat16 products are oneDNN's already"
    refusal = why_not_packed(dtype, device)
    if refusal is None and not is_exact(product, dtype):
        refusal = (
            "float32 products are rounded to fewer bits in this process (by this CPU's matrix unit,"
            " torch.set_float32_matmul_precision, or ONEDNN_DEFAULT_FPMATH_MODE in its environment)"
        )
    return refusal


def width_of(config: PretrainedConfig) -> int:
    """Size of a model's hidden states, 0 where its configuration does not say."""
    return getattr(config.get_text_config(), "hidden_size", 0)


def why_not_packed(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why weights of a dtype cannot be packed on a device, None if they can."""
    if device.type != "cpu":
        return f"weights are packed on a CPU, not on {device}"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this torch is built without oneDNN"
    if dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return None if dtype == torch.float32 else f"this CPU multiplies {dtype} by no instructions of its own"


def is_exact(product: str, dtype: torch.dtype) -> bool:
    """Whether oneDNN's product is as exact as its dtype: float32 must not be rounded to bfloat16 on the way.

    Args:
        product: "onednn" or "packed".
        dtype: of weights and inputs.
    """
    if dtype != torch.float32:
        return True
    for rows, inputs, outputs in ((4, 64, 16), (ROWS, 512, 8), (ROWS, 8, 512)):
        x = torch.linspace(-1, 1, rows * inputs).view(rows, inputs).mul(99).sin()
        weight = torch.linspace(-9, 9, outputs * inputs).view(outputs, inputs).cos()
        expected = x.double() @ weight.double().T
        worst = (_product(product, weight)(x) - expected).abs().max()
        if not worst <= EXACT * expected.abs().max():
            return False
    return True


def _product(name: str, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The product by a weight, (outputs, inputs), as `Product` names it."""
    if name == "packed":
        packed = lay_out(weight)
        return lambda x: packed_product(x, packed, None)
    if name == "torch":
        return lambda x: nn.functional.linear(x, weight)

    def by_onednn(x: torch.Tensor) -> torch.Tensor:
        with onednn():
            return nn.functional.linear(x, weight)

    return by_onednn


@functools.cache
@torch.no_grad()
def measured_gain(width: int, dtype: torch.dtype, product: str = "packed") -> float:
    """How many times as fast a product is here as torch's own; best of a few rounds in turn, in CPU time.

    Each call has another weight, as in a model: one that is in the cache already would flatter both.

    Args:
        width: inputs of the product; it has twice as many outputs.
        dtype: of weights and inputs.
        product: "onednn" or "packed".
    """
    x = torch.randn(ROWS, width).to(dtype)
    weights = [torch.randn(2 * width, width).to(dtype) for _ in range(4)]
    runs = {name: [_product(name, weight) for weight in weights] for name in ("torch", product)}
    best = dict.fromkeys(runs, float("inf"))
    for n in range(ROUNDS + 1):
        for name, calls in runs.items():
            began = time.process_time()
            for call in calls:
                call(x)
            if n:  # the first call prepares the kernels
                best[name] = min(best[name], time.process_time() - began)
    return best["torch"] / max(best[product], 1e-9)


@contextmanager
def onednn() -> Iterator[None]:
    """Meanwhile float32 products by weights as they lie are oneDNN's on a CPU; see `is_exact`.

    torch calls the setting a permission to round to bfloat16. A CPU without a matrix unit for that makes no use of it.
    """
    settings = torch.backends.mkldnn.matmul
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def run_by_onednn(model: nn.Module) -> None:
    """Have the plain linear layers of a model multiply so; those of adapters, too small to gain, are left alone."""
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, Conv1D) and ".lora_" not in name:
            module.forward = functools.partial(_by_onednn, module.forward)


def _by_onednn(forward: Callable, x: torch.Tensor) -> torch.Tensor:
    with nullcontext() if _as_loaded else onednn():
        return forward(x)


@torch.no_grad()
def pack(body: nn.Module, trained: set[int]) -> int:
    """Swap the frozen linear layers of a transformer for packed ones; return the bytes of the packed weights.

    The plain weights are freed, layer by layer. Those that are shared with another module are left alone.

    Args:
        body: without its head, on a CPU.
        trained: ids of the parameters that are trained.
    """
    users: dict[int, int] = {}
    for module in body.modules():
        for p in module.parameters(recurse=False):
            users[id(p)] = users.get(id(p), 0) + 1
    chosen = {
        module: name
        for name, module in body.named_modules()
        if type(module) in (nn.Linear, Conv1D) and type(module.weight.data) is torch.Tensor  # not torchao's
        if id(module.weight) not in trained and users[id(module.weight)] == 1
        if ".lora_" not in name
    }
    nbytes, mappings = 0, mapped_files()
    for group in _groups(body, list(chosen)):
        stack = _Stack([_weight_of(module) for module in group])
        nbytes += sum(stack.sizes) * group[0].weight.dtype.itemsize * _weight_of(group[0]).shape[1]
        for place, module in enumerate(group):
            parent, _, child = chosen[module].rpartition(".")
            setattr(body.get_submodule(parent), child, PackedLinear(stack, place, module))
            give_back([module.weight], mappings=mappings)
            module.weight = None
    return nbytes


def _groups(body: nn.Module, modules: list[nn.Module]) -> list[list[nn.Module]]:
    """Linear layers that a forward pass gives one and the same tensor, one after the other; the others alone.

    Layers that are not called, but read, are left out. A model that does not run on two tokens by themselves has no
    such groups.
    """
    calls: list[tuple[nn.Module, torch.Tensor]] = []
    hooks = [m.register_forward_pre_hook(lambda module, args: calls.append((module, args[0]))) for m in modules]
    try:
        body(input_ids=torch.zeros(1, 2, dtype=torch.long))
    except Exception:
        calls.clear()
    finally:
        for hook in hooks:
            hook.remove()
    groups: list[list[nn.Module]] = []
    last = None
    for module, x in calls:
        if sum(module is other for other, _ in calls) > 1:  # layers that are run several times share no input for sure
            continue
        if x is last and module.weight.dtype == groups[-1][0].weight.dtype:
            groups[-1].append(module)
        else:
            groups.append([module])
        last = x
    called = {id(module) for module, _ in calls} if calls else set(map(id, modules))  # else its weight is read
    grouped = {id(module) for group in groups for module in group}
    return [*groups, *([module] for module in modules if id(module) not in grouped and id(module) in called)]


def add_adapters_in_place(model: nn.Module) -> None:
    """Have plain LoRA layers add their output to the base's in the product itself, not in two passes over it."""
    for module in model.modules():
        plain = isinstance(module, LoraLinear) and type(module).forward is LoraLinear.forward
        if not plain or module.lora_variant or list(module.lora_A) != ["default"]:
            continue
        factors = [module.lora_A["default"], module.lora_B["default"]]
        if all(type(factor) is nn.Linear and factor.bias is None for factor in factors):
            module.forward = functools.partial(_adapted, module, module.forward)


def _adapted(layer: LoraLinear, of_peft: Callable, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """W x + scaling B A x, for a layer of PEFT without dropout."""
    if _as_loaded or torch.is_grad_enabled() or args or kwargs or layer.disable_adapters or layer.merged:
        return of_peft(x, *args, **kwargs)
    out, scaling = layer.base_layer(x), layer.scaling["default"]
    down, up = layer.lora_A["default"], layer.lora_B["default"]
    low = down(x)
    by_row = up.__dict__.get("forward")
    if by_row is not None:  # copies of rows: see `runtimes/hf/rowwise.py`
        return by_row.added(out, low, scaling)
    if low.dtype != out.dtype:
        return out + up(low) * scaling
    out.view(-1, out.shape[-1]).addmm_(low.flatten(0, -2), up.weight.mT, alpha=scaling)
    return out


def _weight_of(module: nn.Module) -> torch.Tensor:
    """(outputs, inputs) of a linear layer or a `Conv1D`, which keeps it transposed."""
    weight = module.weight
    return weight.mT.contiguous() if isinstance(module, Conv1D) else weight


def lay_out(weight: torch.Tensor) -> torch.Tensor:
    """A weight, (outputs, inputs), in blocks as oneDNN wants them; `to_dense()` gives it back to the bit."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


def packed_product(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x, (..., inputs), times a weight of `lay_out`, plus a bias."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def tell(product: Product, nbytes: int) -> None:
    """Say in one line what computes the products."""
    say(f"{product.why}; {nbytes / 2**20:.0f} MiB of weights packed, in place of as many" if nbytes else product.why)
