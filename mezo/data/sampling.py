"""Which items a run keeps: a pure function of (data_seed, split), the same on every machine and library version."""

import hashlib
from collections.abc import Mapping, Sequence

from mezo.config import Data
from mezo.data.task import Item
from mezo.errors import UserError

Pool = dict[int, list[int]]
"""Indices by class, each class in its shuffled order: a prefix of it is a random sample."""


def sample(items: dict[str, list[Item]], data: Data, dev_size: int = 0) -> dict[str, list[Item]]:
    """The items that k_shot and num_* keep, in their original order.

    Where there is no dev split and `dev_size` is not 0, dev comes from train: the two take opposite ends of one
    shuffled order, so that they are disjoint and neither depends on the size of the other.

    Args:
        items: all items by split.
        data: k_shot, num_train, num_dev, num_test, data_seed.
        dev_size: the most examples cut from train for dev where the configuration gives no number; 0: no dev.

    Raises:
        UserError: more asked for than there is, or a number for a split that is not there.
    """
    kept = sample_indices(items, data, dev_size)
    return {split: [items[split if split in items else "train"][i] for i in kept[split]] for split in kept}


def sample_indices(items: Mapping[str, Sequence[Item]], data: Data, dev_size: int = 0) -> dict[str, Sequence[int]]:
    """Numbers, rising, of what `sample` keeps; those of dev are of train where there is no dev split."""
    cut_dev = "dev" not in items and "train" in items and dev_size > 0
    for split in ("dev", "test"):
        number = getattr(data, f"num_{split}")
        if number and split not in items and not (split == "dev" and cut_dev):
            raise UserError(f"--num-{split} is {number}, but there is no {split} set: give --{split}-file")
    chosen = lambda split: getattr(data, f"num_{split}") or (data.k_shot and split != "test")  # noqa: E731
    asked = {split: chosen(split) or (cut_dev and split == "train") for split in items}
    pools = {split: _pool(rows, data, split) for split, rows in items.items() if asked[split]}
    kept = {split: _select(pools[split], data, split) if asked[split] else range(len(items[split])) for split in items}
    if cut_dev:
        kept |= _cut_dev(pools["train"], kept["train"], data, dev_size)
    return {split: sorted(numbers) if asked.get(split, True) else numbers for split, numbers in kept.items()}


def shuffled_classes(labels: Sequence[int], classes: int, seed: int, split: str) -> Pool:
    """Indices of each class in the order of sha256(seed, split, index).

    Args:
        labels: the class of each example, 0 <= label < classes.
        classes: how many there are, examples or not.
        seed: the run's data_seed.
        split: name of the split.

    >>> shuffled_classes([0, 1, 0, 1, 0], 3, seed=0, split="train")
    {0: [4, 0, 2], 1: [1, 3], 2: []}
    """
    order = sorted(range(len(labels)), key=lambda i: hashlib.sha256(f"{seed}/{split}/{i}".encode()).digest())
    return {label: [i for i in order if labels[i] == label] for label in range(classes)}


def balanced_quotas(sizes: Sequence[int], number: int) -> list[int]:
    """How many of each class make `number` in all: equal shares; where a class runs out, the others give the rest.

    >>> balanced_quotas([100, 100], 7), balanced_quotas([2, 100], 10)
    ([3, 4], [2, 8])
    """
    quotas = [0] * len(sizes)
    # The smallest class first: what it lacks is shared among those still to come.
    for left, label in zip(range(len(sizes), 0, -1), sorted(range(len(sizes)), key=sizes.__getitem__), strict=True):
        quotas[label] = min(sizes[label], number // left)
        number -= quotas[label]
    return quotas


def class_pool(items: Sequence[Item], seed: int, split: str) -> Pool:
    """Items by class, each class shuffled; items with options of their own have no classes and are one.

    Args:
        items: of one split, at least one.
        seed: the run's data_seed.
        split: its name, or any other that is to have an order of its own.

    >>> class_pool([Item({}, (" no", " yes"), label, "") for label in (0, 1, 1)], 0, "train")
    {0: [0], 1: [1, 2]}
    """
    labels, classes = [item.label for item in items], len(items[0].options)
    if not share_options(items) or not classes:
        labels, classes = [0] * len(items), 1
    return shuffled_classes(labels, classes, seed, split)


def share_options(items: Sequence[Item]) -> bool:
    """Whether all items have the same options: these are classes then."""
    return all(item.options == items[0].options for item in items)


def take_balanced(pool: Pool, number: int) -> list[int]:
    """`number` indices of a pool that has so many, balanced over its classes.

    >>> take_balanced({0: [4, 0, 2], 1: [1, 3]}, 3)
    [4, 0, 1]
    """
    quotas = balanced_quotas([len(indices) for indices in pool.values()], number)
    return [i for indices, quota in zip(pool.values(), quotas, strict=True) for i in indices[:quota]]


def _pool(items: Sequence[Item], data: Data, split: str) -> Pool:
    by_class = data.k_shot and split != "test"
    if by_class and not share_options(items):
        raise UserError(f"--k-shot needs the same options in every example of {split}: use --num-{split}")
    if not by_class and data.balance == "off":
        return shuffled_classes([0] * len(items), 1, data.data_seed, split)
    return class_pool(items, data.data_seed, split)


def _select(pool: Pool, data: Data, split: str) -> list[int]:
    number = getattr(data, f"num_{split}")
    if data.k_shot and split != "test" and not number:
        return _per_class(pool, data, 1, split)
    return _balanced(pool, number or sum(map(len, pool.values())), split)


def _cut_dev(pool: Pool, train: list[int], data: Data, dev_size: int) -> dict[str, list[int]]:
    """Dev from the far end of the train pool, and train without it."""
    far_end = {label: indices[::-1] for label, indices in pool.items()}
    if data.k_shot and not data.num_dev:
        dev = _per_class(far_end, data, 2, "train")
    else:
        size = sum(map(len, pool.values()))
        number = data.num_dev or min(dev_size, size // 10)
        # half of a class at most, or its share where dev is more than half of all: train keeps some of each
        share = max(2 * number, size)
        far_end = {label: items[: -(-len(items) * share // (2 * size))] for label, items in far_end.items()}
        dev = _balanced(far_end if number <= size else pool, number, "dev")
    if data.k_shot or data.num_train:
        if shared := set(train) & set(dev):
            raise UserError(
                f"dev is cut from train, and the two ask for {len(shared)} examples too many:"
                " lower --num-train or --num-dev"
            )
    else:
        train = list(set(train) - set(dev))
    if not train:
        raise UserError(f"--num-dev {len(dev)} takes every training example: lower it")
    return {"train": train, "dev": dev} if dev else {"train": train}


def _per_class(pool: Pool, data: Data, splits: int, split: str) -> list[int]:
    """k_shot of each class; with --balance off as many as there are, those of the last split what the first leaves."""
    k = data.k_shot
    if data.balance == "off":
        return [i for indices in pool.values() for i in indices[: min(k, max(0, len(indices) - k * (splits - 1)))]]
    for label, indices in pool.items():
        if len(indices) < k * splits:
            asked = f"{k}" if splits == 1 else f"{k} for train and as many for dev"
            raise UserError(
                f"{split}: class {label} has {len(indices)} examples, k_shot asks for {asked}:"
                " lower --k-shot, add examples of that class, or take what there is with --balance off"
            )
    return [i for indices in pool.values() for i in indices[:k]]


def _balanced(pool: Pool, number: int, split: str) -> list[int]:
    size = sum(map(len, pool.values()))
    if number > size:
        raise UserError(f"{split} has {size} examples, --num-{split} asks for {number}: lower it")
    return take_balanced(pool, number)
