"""A saved state of the optimizer: brought to today's form, matched with parameters, and checked before any write."""

import copy
from collections.abc import Iterable, Mapping

import torch

from mezo.optim.options import check_options, fill_in, rule_of, rule_of_all
from mezo_kernels import canonical_name
from mezo_kernels.layout import without_adapter

# as torch.optim's SGD and Adam call them
MOMENTS = {"momentum": ("momentum_buffer",), "sign": ()} | dict.fromkeys(("adam", "adamw"), ("exp_avg", "exp_avg_sq"))
"""State of each fused rule beside the master, by name."""


def moments_of(group: dict) -> tuple[str, ...]:
    """Names of the moments that the rule of a group keeps."""
    kernel = rule_of(group).kernel()
    return MOMENTS[kernel.kind] if kernel else ()


def of_today(group: dict, defaults: dict, common: Mapping) -> dict:
    """A copy of a saved group with what has come since it was saved.

    Args:
        group: of a state dict, or of a pickled optimizer.
        defaults: of the optimizer.
        common: what older versions kept beside the groups.
    """
    group = {name: value if name == "params" else copy.deepcopy(value) for name, value in group.items()}
    if group.get("rule", "sgd") == "sgd":
        group["rule"] = "momentum" if group.get("momentum") else "sgd"  # an option of sgd once
    if "z_names" not in group and "param_names" in group:
        group["z_names"] = [without_adapter(name) for name in group["param_names"]]
    group = defaults | copy.deepcopy(dict(common)) | group
    fill_in(group, strict=False)
    return group


def with_z_names(groups: Iterable[dict]) -> list[dict]:
    """Groups whose parameters all have a name for z: where one has none, its position, as in older versions."""
    groups, position = list(groups), 0
    for group in groups:
        group.setdefault("z_names", [str(position + i) for i in range(len(group["params"]))])
        position += len(group["params"])
    return groups


def matched(state_dict: Mapping, live: list[dict], defaults: dict) -> tuple[list[dict], dict]:
    """Groups and state for the parameters of an optimizer; nothing of theirs is written.

    Args:
        state_dict: of this version or an older one. Parameters that have names on both sides are matched by these,
            others by position.
        live: groups of the optimizer.
        defaults: of the optimizer.
    Returns:
        Groups that replace the live ones, and copies of the saved tensors by parameter, on its device.
    Raises:
        ValueError: another number of groups or parameters, other names, shapes or dtypes, missing state, bad options.
    """
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(
                f"a state of MeZO has the keys state and param_groups, got {', '.join(map(str, state_dict))}"
            )
    common = state_dict.get("mezo", {})
    saved = with_z_names(of_today(group, defaults, common) for group in state_dict["param_groups"])
    groups, state = [], {}
    for group, ids in _pairs(saved, live):
        check_options(group)
        for p, name, i in zip(group["params"], group["z_names"], ids, strict=True):
            if i in state_dict["state"]:
                state[p] = _tensors(name, p, state_dict["state"][i], group)
        groups.append(group)
    rule_of_all(groups)
    return groups, state


def _pairs(saved: list[dict], live: list[dict]) -> list[tuple[dict, list]]:
    """(saved group with live parameters in place of its own, ids of their state), in the order of the live groups."""
    if len(saved) != len(live):
        raise ValueError(
            f"the state has {len(saved)} param groups, the optimizer {len(live)}: build it with the same groups"
        )
    if all("param_names" in group for group in (*saved, *live)):
        _check_names(saved, live)
        by_name = {_names(group): group for group in saved}
        return [_by_name(by_name, group) for group in live]
    for number, (theirs, group) in enumerate(zip(saved, live, strict=True)):
        if len(theirs["params"]) != len(group["params"]):
            counts = f"{len(theirs['params'])} parameters in the state and {len(group['params'])} in the optimizer"
            raise ValueError(f"group {number} has {counts}: build it with the same parameters")
    return [
        (_joined(theirs, group, theirs["z_names"]), theirs["params"]) for theirs, group in zip(saved, live, strict=True)
    ]


def _names(group: dict) -> frozenset[str]:
    return frozenset(map(canonical_name, group["param_names"]))


def _check_names(saved: list[dict], live: list[dict]) -> None:
    theirs, ours = (frozenset().union(*map(_names, groups)) for groups in (saved, live))
    for what, names in (("the optimizer lacks", theirs - ours), ("the state lacks", ours - theirs)):
        if names:
            raise ValueError(
                f"{what} {len(names)} parameters of the other: {', '.join(sorted(names)[:3])}; nothing was loaded"
            )
    if {*map(_names, saved)} != {*map(_names, live)}:
        raise ValueError(
            "the parameters are the same, but in other param groups: build the optimizer with those of the state"
        )


def _by_name(saved: dict[frozenset, dict], group: dict) -> tuple[dict, list]:
    theirs = saved[_names(group)]
    order = [canonical_name(name) for name in theirs["param_names"]]
    places = [order.index(canonical_name(name)) for name in group["param_names"]]
    # ids that are names come from torch's distributed checkpoints, which have matched them already
    matched_before = all(isinstance(i, str) for i in theirs["params"])
    ids = theirs["params"] if matched_before else [theirs["params"][i] for i in places]
    return _joined(theirs, group, [theirs["z_names"][i] for i in places]), ids


def _joined(theirs: dict, group: dict, z_names: list[str]) -> dict:
    names = {"param_names": group["param_names"]} if "param_names" in group else {}
    return theirs | names | {"params": group["params"], "z_names": list(z_names)}


def _tensors(name: str, p: torch.Tensor, saved: Mapping, group: dict) -> dict[str, torch.Tensor]:
    """Master and moments of one parameter, checked and copied to its device."""
    needed = ("master", *(["start"] if group["anchored_decay"] else []))
    needed += moments_of(group) if group["updates"] else ()
    for key in needed:
        if key not in saved:
            raise ValueError(f"{name}: the state has no {key}, which the rule {group['rule']} needs: it is not whole")
    for key, tensor in saved.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float32 or tensor.shape != p.shape:
            got = f"{tuple(tensor.shape)} of {tensor.dtype}" if isinstance(tensor, torch.Tensor) else repr(tensor)
            raise ValueError(f"{name}: {key} must be {tuple(p.shape)} of torch.float32, got {got}; nothing was loaded")
    return {key: tensor.to(p.device, copy=True) for key, tensor in saved.items()}
