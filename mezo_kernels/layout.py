"""ParamLayout: which parameters an op touches, and which elements of the full parameters their storage holds."""

import itertools
import math
import operator
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mezo_kernels.philox import tensor_id

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# columns of `ParamLayout.geometry`, one row a parameter; local (r, c) is element first_index + r full_cols + c
STRIDED, TENSOR_ID, FIRST_INDEX, ROWS, COLS, FULL_COLS = range(6)
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_serial = itertools.count()


@dataclass(frozen=True)
class ParamSlot:
    """One parameter, or the block of it that a rank holds.

    Args:
        name: canonical name; it alone decides z, with the element's index in the full parameter.
        tensor: storage, float32, bfloat16 or float16. Strided if 1-D or 2-D; contiguous otherwise.
        full_shape: shape of the unsharded parameter; by default that of `tensor`.
        row_start, col_start: position of the block in the full parameter (1-D: `row_start` alone).
    """

    name: str
    tensor: torch.Tensor
    full_shape: tuple[int, ...] | None = None
    row_start: int = 0
    col_start: int = 0


class ParamLayout:
    """An ordered set of parameters that one op updates in one launch.

    Args:
        params: a mapping {name: tensor} of whole parameters, or an iterable of `ParamSlot`.
    Raises:
        ValueError: empty, colliding tensor_ids, aliased storage, unsupported dtype, mixed devices, a block outside
            its full parameter.

    >>> layout = ParamLayout({"w": torch.zeros(3, 4), "b": torch.zeros(3)})
    >>> layout.names, layout.n_elements
    (('w', 'b'), 15)
    """

    def __init__(self, params: Mapping[str, torch.Tensor] | Iterable[ParamSlot]):
        slots = [ParamSlot(*item) for item in params.items()] if isinstance(params, Mapping) else list(params)
        if not slots:
            raise ValueError("a ParamLayout needs at least one parameter, got none")
        for slot in slots:
            if not isinstance(slot, ParamSlot):
                raise ValueError(f"expected a mapping {{name: tensor}} or ParamSlots, got a {type(slot).__name__}")
            _check_tensor(slot.name, slot.tensor)
        self.slots = tuple(slots)
        self.names = tuple(slot.name for slot in slots)
        self.tensors = [slot.tensor for slot in slots]
        self.device = slots[0].tensor.device
        self.n_elements = sum(tensor.numel() for tensor in self.tensors)
        self.serial = next(_serial)
        self.elements = tuple(_geometry(slot) for slot in slots)
        strided = any(not tensor.is_contiguous() for tensor in self.tensors)
        # on the host whatever the default device: backends read it there
        self.geometry = torch.tensor([(strided, *row) for row in self.elements], dtype=torch.int64, device="cpu")
        self.checked_targets: set[tuple[int, ...]] = set()
        _check_ids(self.names)
        _check_devices(slots)
        check_no_alias(slots)

    @classmethod
    def from_module(cls, module: torch.nn.Module) -> "ParamLayout":
        """Layout of the trainable parameters of `module` under their canonical names; tied weights appear once.

        It holds their storage of now: after `module.to(...)`, which moves them to another, make a new one.

        Raises:
            ValueError: no parameter of `module` requires a gradient; as `ParamLayout`.

        >>> ParamLayout.from_module(torch.nn.Linear(10, 2)).names
        ('weight', 'bias')
        """
        trainable = {canonical_name(name): p.detach() for name, p in module.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError("no parameter of the module requires a gradient; call requires_grad_() on those to train")
        return cls(trainable)

    def like(self, tensors: Iterable[torch.Tensor]) -> "ParamLayout":
        """The same parameters and blocks in other storage (other dtype or strides), e.g. engine buffers.

        >>> w = torch.zeros(3, 4)
        >>> ParamLayout({"w": w}).like([w.bfloat16()]).tensors[0].dtype
        torch.bfloat16
        """
        pairs = zip(self.slots, tensors, strict=True)
        return ParamLayout(
            ParamSlot(s.name, t, s.full_shape or tuple(s.tensor.shape), s.row_start, s.col_start) for s, t in pairs
        )

    @torch.no_grad()
    def copy_(self, other: "ParamLayout") -> "ParamLayout":
        """Copy the values of a layout of the same elements, rounded once where this one has fewer bits.

        >>> w = ParamLayout({"w": torch.zeros(2, dtype=torch.bfloat16)})
        >>> w.copy_(w.like([torch.tensor([1.0, 1.001])])).tensors[0]
        tensor([1., 1.], dtype=torch.bfloat16)
        """
        if not self.same_elements(other):
            raise ValueError("copy_ needs a layout of the same elements in the same order; build it with layout.like()")
        torch._foreach_copy_(self.tensors, other.tensors)
        return self

    def same_elements(self, other: "ParamLayout") -> bool:
        """True if both layouts hold the same elements of the same parameters in the same order."""
        return self.names == other.names and self.elements == other.elements

    def __repr__(self):
        return f"ParamLayout({len(self.slots)} parameters, {self.n_elements} elements, {self.device})"


def canonical_name(name: str) -> str:
    """A parameter's name in the bare model, without what wrappers add to it.

    The adapter name in `lora_A.<adapter>.weight` is dropped, which leaves PEFT's state-dict key; so are `_orig_mod` of
    torch.compile, the names of FSDP's and of activation checkpoints' wrappers, and DDP's `module` in front.

    >>> canonical_name("base_model.model.layers.0.q_proj.lora_A.default.weight")
    'base_model.model.layers.0.q_proj.lora_A.weight'
    >>> canonical_name("module._orig_mod.layers.0.weight")
    'layers.0.weight'
    """
    parts = [part for part in without_adapter(name).split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def without_adapter(name: str) -> str:
    """`canonical_name` as it was at first: optimizer states of that time hold parameters under these names."""
    parts = name.split(".")
    lora = [i for i, part in enumerate(parts) if part in ("lora_A", "lora_B")]
    if lora and lora[-1] + 2 < len(parts):
        del parts[lora[-1] + 1]
    return ".".join(parts)


def matrix_view(tensor: torch.Tensor) -> tuple[int, int, int, int]:
    """(rows, cols, row_stride, col_stride) of a tensor's storage, in elements."""
    if tensor.dim() == 2:
        return *tensor.shape, *tensor.stride()
    return 1, tensor.numel(), tensor.numel(), tensor.stride(0) if tensor.dim() == 1 else 1


def _geometry(slot: ParamSlot) -> tuple[int, int, int, int, int]:
    """(tensor_id, first_index, rows, cols, full_cols) of one row of `ParamLayout.geometry`."""
    shape = tuple(slot.tensor.shape)
    full = shape if slot.full_shape is None else tuple(slot.full_shape)
    starts = (slot.row_start, slot.col_start)
    where = f"{slot.name}: shape {shape} at {starts} of full shape {full}"
    if len(full) != len(shape):
        raise ValueError(f"{where}: the tensor and the full parameter must have the same number of dimensions")
    rows, cols, _, _ = matrix_view(slot.tensor)
    if len(shape) == 2:
        full_rows, full_cols, (row_start, col_start) = *full, starts
    else:
        full_rows, full_cols, (col_start, row_start) = 1, math.prod(full), starts
        if len(shape) != 1 and full != shape:
            raise ValueError(f"{where}: only 1-D and 2-D parameters can be sharded")
    inside = 0 <= row_start <= full_rows - rows and 0 <= col_start <= full_cols - cols
    if not inside:
        raise ValueError(f"{where}: the block must lie inside the full parameter")
    return tensor_id(slot.name), row_start * full_cols + col_start, rows, cols, full_cols


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {tensor.dtype}")
    if is_traceable_wrapper_subclass(tensor):
        raise ValueError(f"{name}: expected plain storage, got a {type(tensor).__name__}; pass its local tensor")
    if tensor.layout != torch.strided or tensor.is_neg():
        kind = "negated view" if tensor.layout == torch.strided else f"tensor of layout {tensor.layout}"
        raise ValueError(f"{name}: expected storage with strides that holds the values, got a {kind}")
    if tensor.numel() == 0:
        raise ValueError(f"{name}: expected at least one element, got shape {tuple(tensor.shape)}")
    if tensor.dim() > 2 and not tensor.is_contiguous():
        raise ValueError(f"{name}: a tensor of {tensor.dim()} dimensions must be contiguous; call .contiguous()")


def _check_ids(names: tuple[str, ...]) -> None:
    seen = {}
    for name in names:
        other = seen.get(tensor_id(name))
        if other is not None:
            raise ValueError(f"parameters {other!r} and {name!r} have the same tensor_id and so the same z; rename one")
        seen[tensor_id(name)] = name


def _check_devices(slots: list[ParamSlot]) -> None:
    first = slots[0]
    for slot in slots:
        if slot.tensor.device != first.tensor.device:
            raise ValueError(
                f"all parameters of a layout must be on one device: {first.name} is on {first.tensor.device}, "
                f"{slot.name} on {slot.tensor.device}; move them or build one layout a device"
            )


def _byte_range(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def check_no_alias(slots: Iterable[ParamSlot]) -> None:
    """Raise ValueError if two elements of the slots share storage. Interleaved views of one buffer are told apart."""
    slots = [slot for slot in slots if slot.tensor.device.type != "meta"]
    ranges = sorted(((*_byte_range(slot.tensor), slot) for slot in slots), key=lambda item: item[:2])
    cluster, cluster_end = [], -1
    for start, end, slot in [*ranges, (math.inf, math.inf, None)]:
        if start >= cluster_end:
            _check_cluster(cluster)
            cluster, cluster_end = [], -1
        cluster.append((start, slot))
        cluster_end = max(cluster_end, end)


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    """True unless each dimension, from the smallest stride up, steps over all that the smaller ones reach."""
    reach = 0
    for stride, n in sorted((stride, n) for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += stride * (n - 1)
    return False


def _check_cluster(cluster: list[tuple[int, ParamSlot]]) -> None:
    """Mark the bytes that each slot of a stretch of memory writes; one that is marked already is an alias."""
    for _, slot in cluster:
        if _overlaps_itself(slot.tensor):
            raise ValueError(f"{slot.name}: elements share storage (an expanded or overlapping view); call .clone()")
    if len(cluster) < 2:
        return
    base = cluster[0][0]
    span = max(_byte_range(slot.tensor)[1] for _, slot in cluster) - base
    written = torch.zeros(span, dtype=torch.bool, device="cpu")
    for i, (start, slot) in enumerate(cluster):
        size = slot.tensor.element_size()
        strides = (*(stride * size for stride in slot.tensor.stride()), 1)
        view = torch.as_strided(written, (*slot.tensor.shape, size), strides, start - base)
        if view.any():
            others = ", ".join(other.name for k, (_, other) in enumerate(cluster) if k != i)
            raise ValueError(f"{slot.name} shares storage with another parameter ({others}); list tied weights once")
        view.fill_(True)


class AddressCache:
    """Tables that a backend derives from addresses, rebuilt only when an address, a dtype or a stride changes.

    A table lives as long as the layouts it was built for: a captured graph or another stream may still read it.

    Args:
        build: builds the table from (theta, plus, minus, geometry), the arguments of every op.
        max_entries: tables of one set of layouts, whose tensors may move to and fro.
    """

    def __init__(self, build: Callable, max_entries: int = 8):
        self.build, self.max_entries = build, max_entries
        self.layouts: dict[tuple[int, ...], _Tables] = {}

    def __call__(self, theta, plus, minus, geometry: list[torch.Tensor]):
        layouts = tuple(map(torch.Tensor.data_ptr, geometry))
        met = self.layouts.get(layouts) or self._meet(layouts, geometry)
        tensors = [*theta, *plus, *minus]
        key = [*map(torch.Tensor.data_ptr, tensors), *map(_dtype, tensors)]
        # a clone made by a compiler keeps the strides of dense tensors only
        if met.strided:
            key += map(torch.Tensor.stride, tensors)
        # comparing with the last key saves the hash of every address
        latest, table = met.last
        if latest != key:
            table = self._look_up(met.tables, tuple(key), theta, plus, minus, geometry[0])
            met.last = key, table  # at once: another thread may ask for other tensors of these layouts
        return table

    def _look_up(self, tables: OrderedDict, key: tuple, *arguments):
        if key not in tables:
            tables[key] = self.build(*arguments)
            if len(tables) > self.max_entries:
                tables.popitem(last=False)
        return tables[key]

    def _meet(self, layouts: tuple[int, ...], geometry: list[torch.Tensor]) -> "_Tables":
        """Once for each set of layouts, since reading a tensor costs 5 us; forgotten when one of them is gone.

        The address of a layout's geometry names it, for as long as it lives.
        """
        for one in geometry:
            weakref.finalize(one, self.layouts.pop, layouts, None).atexit = False
        met = self.layouts[layouts] = _Tables(any(g[0, STRIDED].item() for g in geometry))
        return met


@dataclass
class _Tables:
    """Of one set of layouts: key and table of the last call, and tables by key."""

    strided: bool
    last: tuple[list | None, Any] = (None, None)
    tables: OrderedDict = field(default_factory=OrderedDict)


_dtype = operator.attrgetter("dtype")
