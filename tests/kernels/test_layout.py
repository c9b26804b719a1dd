"""ParamLayout: what it takes, how it maps local elements to the full parameter, and what it refuses."""

import pytest
import torch

from mezo_kernels import ParamLayout, ParamSlot, canonical_name, perturb_, standard_normal, tensor_id

# found by search: crc32 of both is the same
COLLIDING = "layers.29685295.weight", "layers.32060020.weight"


def z_of(*slots):
    """z as the layout sees it: perturb zeros by 1."""
    layout = ParamLayout(slots)
    perturb_(layout, 1.0, seed=3)
    return layout.tensors


def full_z(rows, cols, name="w"):
    return standard_normal(3, name, 0, rows * cols).view(rows, cols)


def test_names_elements_and_device():
    layout = ParamLayout({"w": torch.zeros(3, 4), "b": torch.zeros(3, dtype=torch.bfloat16)})
    assert layout.names == ("w", "b")
    assert layout.n_elements == 15
    assert layout.device == torch.device("cpu")
    assert "2 parameters, 15 elements" in repr(layout)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 3, 4), (1, 1, 1, 1)], ids=str)
def test_any_shape_is_row_major(shape):
    tensor = torch.zeros(shape)
    assert torch.equal(z_of(ParamSlot("w", tensor))[0].flatten(), standard_normal(3, "w", 0, tensor.numel()))


@pytest.mark.parametrize(("row", "col", "rows", "cols"), [(2, 0, 3, 9), (0, 4, 7, 5), (1, 3, 5, 2), (6, 8, 1, 1)])
def test_a_shard_holds_its_slice_of_the_full_z(row, col, rows, cols):
    (z,) = z_of(ParamSlot("w", torch.zeros(rows, cols), (7, 9), row, col))
    assert torch.equal(z, full_z(7, 9)[row : row + rows, col : col + cols])


def test_a_shard_of_a_vector():
    (z,) = z_of(ParamSlot("b", torch.zeros(4), (11,), 5))
    assert torch.equal(z, standard_normal(3, "b", 5, 4))


@pytest.mark.parametrize(
    "view",
    [
        lambda: torch.zeros(9, 7).t(),
        lambda: torch.zeros(7, 20)[:, 3:12],
        lambda: torch.zeros(14, 18)[::2, ::2],
        lambda: torch.zeros(7, 9),
    ],
    ids=["transposed", "columns", "every second", "contiguous"],
)
def test_a_strided_view_has_the_z_of_its_own_elements(view):
    (z,) = z_of(ParamSlot("w", view()))
    assert torch.equal(z, full_z(7, 9))


def test_what_lies_between_the_elements_of_a_view_is_untouched():
    buffer = torch.zeros(6, 10)
    z_of(ParamSlot("w", buffer[::2, 1:9:3]))
    buffer[::2, 1:9:3] = 0
    assert torch.equal(buffer, torch.zeros(6, 10))


def test_interleaved_views_of_one_buffer_are_legal():
    """A fused gate_up buffer: two parameters in alternate columns share no element."""
    buffer = torch.zeros(4, 12)
    left, right = z_of(ParamSlot("a", buffer[:, :6]), ParamSlot("b", buffer[:, 6:]))
    assert torch.equal(left, full_z(4, 6, "a"))
    assert torch.equal(right, full_z(4, 6, "b"))
    even, odd = z_of(ParamSlot("a", torch.zeros(24)[::2]), ParamSlot("b", torch.zeros(24)[1::2]))
    assert torch.equal(even, full_z(1, 12, "a")[0])
    assert torch.equal(odd, full_z(1, 12, "b")[0])
    ParamLayout({"even": buffer[:, ::2], "odd": buffer[:, 1::2]})


BUFFER = torch.zeros(4, 12)
ALIASES = {
    "tied": {"a": BUFFER, "b": BUFFER},
    "reshaped": {"a": BUFFER, "b": BUFFER.view(48)},
    "overlap": {"a": BUFFER[:, :7], "b": BUFFER[:, 6:]},
    "transposed": {"a": BUFFER[:2], "b": BUFFER.t()},
    "expanded": {"a": torch.zeros(1, 4).expand(3, 4)},
    "self-overlapping": {"a": torch.zeros(10).as_strided((3, 4), (2, 1))},
    "other dtype": {"a": BUFFER, "b": BUFFER.view(torch.bfloat16)},
}


@pytest.mark.parametrize("params", ALIASES.values(), ids=ALIASES)
def test_aliased_storage_is_refused(params):
    with pytest.raises(ValueError, match="share"):
        ParamLayout(params)


def test_tied_weights_of_a_module_appear_once():
    module = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 4), "head": torch.nn.Linear(4, 5, bias=False)})
    module["head"].weight = module["embed"].weight
    assert ParamLayout.from_module(module).names == ("embed.weight",)


def test_from_module_takes_trainable_parameters_under_canonical_names():
    module = torch.nn.Module()
    module.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(4, 2, bias=False)})
    module.base = torch.nn.Linear(4, 4).requires_grad_(False)
    layout = ParamLayout.from_module(module)
    assert layout.names == ("lora_A.weight",)
    assert layout.tensors[0].data_ptr() == module.lora_A["default"].weight.data_ptr()
    assert not layout.tensors[0].requires_grad


def test_a_module_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="no parameter of the module requires a gradient"):
        ParamLayout.from_module(torch.nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.lora_A.default.weight", "a.lora_A.weight"),
        ("a.lora_B.my_adapter.weight", "a.lora_B.weight"),
        ("a.lora_A.weight", "a.lora_A.weight"),
        ("model.weight", "model.weight"),
    ],
)
def test_canonical_name(name, expected):
    assert canonical_name(name) == expected


def test_colliding_tensor_ids_are_refused():
    assert tensor_id(COLLIDING[0]) == tensor_id(COLLIDING[1])
    with pytest.raises(ValueError, match=r"29685295.*32060020.*rename"):
        ParamLayout({name: torch.zeros(2) for name in COLLIDING})
    with pytest.raises(ValueError, match="same tensor_id"):
        ParamLayout([ParamSlot("w", torch.zeros(2)), ParamSlot("w", torch.zeros(2))])


REFUSED = {
    "nothing": (lambda: {}, "at least one parameter"),
    "an array": (lambda: {"w": [1.0]}, r"expected a torch\.Tensor, got list"),
    "tensors without names": (lambda: [torch.zeros(2)], "a mapping {name: tensor} or ParamSlots, got a Tensor"),
    "pairs": (lambda: torch.nn.Linear(2, 2).named_parameters(), "or ParamSlots, got a tuple"),
    "sparse": (
        lambda: {"w": torch.eye(3).to_sparse()},
        r"storage with strides .* got a tensor of layout torch\.sparse",
    ),
    "negated": (lambda: {"w": torch.ones(3, dtype=torch.complex64).conj().imag}, "got a negated view"),
    "float64": (lambda: {"w": torch.zeros(2, dtype=torch.float64)}, "float32, bfloat16 or float16"),
    "integers": (lambda: {"w": torch.zeros(2, dtype=torch.int32)}, "got torch.int32"),
    "no elements": (lambda: {"w": torch.zeros(0, 4)}, "at least one element"),
    "strided 3-D": (lambda: {"w": torch.zeros(2, 3, 4).transpose(0, 2)}, "contiguous"),
    "two devices": (lambda: {"w": torch.zeros(2), "v": torch.zeros(2, device="meta")}, "one device"),
    "too many rows": (lambda: [ParamSlot("w", torch.zeros(3, 4), (4, 4), 2)], "inside"),
    "too many columns": (lambda: [ParamSlot("w", torch.zeros(3, 4), (4, 5), 0, 2)], "inside"),
    "negative start": (lambda: [ParamSlot("w", torch.zeros(3), (5,), -1)], "inside"),
    "other dimensions": (lambda: [ParamSlot("w", torch.zeros(3), (3, 1))], "same number of dimensions"),
    "sharded 3-D": (lambda: [ParamSlot("w", torch.zeros(1, 3, 4), (2, 3, 4))], "only 1-D and 2-D"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_parameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        ParamLayout(make())


def test_like_keeps_the_block():
    layout = ParamLayout([ParamSlot("w", torch.zeros(2, 3), (4, 9), 1, 4)])
    other = layout.like([torch.zeros(3, 2, dtype=torch.bfloat16).t()])
    assert layout.same_elements(other)
    assert not layout.same_elements(ParamLayout({"w": torch.zeros(2, 3)}))
    with pytest.raises(ValueError, match="zip"):
        layout.like([])
