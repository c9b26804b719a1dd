"""Which copies of theta a step scores: both signs of every perturbation, or one sign of each, with theta or without."""

from collections.abc import Callable, Hashable
from typing import TypeVar

Read = TypeVar("Read")


class Sides:
    """Reads scores or texts at the copies of theta that a runtime holds, plus0, minus0, plus1, ..., in pairs.

    One-sided, the second of each pair is what was read at theta itself, which minus0 holds: n perturbations cost n + 1
    forward passes of a batch, in however many calls they are read. Where the rule guides, plus alone is read, and
    stands for both; of the one perturbation along several z both signs are.

    Args:
        one_sided, guides: of the rule.

    >>> sides, asked = Sides(one_sided=True), []
    >>> def read(names):
    ...     asked.append(names)
    ...     return names
    >>> sides.pairs(2, "batch", read), sides.pairs(1, "batch", read)
    ([('plus0', 'minus0'), ('plus1', 'minus0')], [('plus0', 'minus0')])
    >>> asked
    [['plus0', 'plus1', 'minus0'], ['plus0']]
    """

    def __init__(self, one_sided: bool, guides: bool = False):
        self.one_sided, self.guides = one_sided, guides
        self._at_theta: dict[Hashable, object] = {}
        self._all_theta = self._along = False

    def written(self, theta_changed: bool, along: bool = False) -> None:
        """The perturbed copies were written anew; what was read at theta stays true until theta changes.

        Args:
            theta_changed: theta is another.
            along: one perturbation, along several z.
        """
        self._all_theta, self._along = False, along
        if theta_changed:
            self._at_theta.clear()

    def loaded(self) -> None:
        """Theta is another."""
        self._at_theta.clear()

    def equalised(self) -> None:
        """Every copy holds theta itself: both of each pair are read, as often as is asked, to show the noise."""
        self._all_theta = True

    def pairs(self, count: int, batch: Hashable, read: Callable[[list[str]], list[Read]]) -> list[tuple[Read, Read]]:
        """(what was read at plus k, what was read at minus k, at theta, or at plus k) of each perturbation k.

        Args:
            count: perturbations whose copies are held.
            batch: names what is read; one-sided, theta is read once for each name.
            read: names of copies -> scores or texts at each, in order.
        """
        if self.guides and not (self._all_theta or self._along):
            return [(plus, plus) for plus in read([f"plus{k}" for k in range(count)])]
        if not self.one_sided or self._all_theta:
            read_at = read([f"{sign}{k}" for k in range(count) for sign in ("plus", "minus")])
            return list(zip(read_at[::2], read_at[1::2], strict=True))
        names, known = [f"plus{k}" for k in range(count)], batch in self._at_theta
        read_at = list(read(names if known else [*names, "minus0"]))
        if not known:
            self._at_theta[batch] = read_at.pop()
        return [(plus, self._at_theta[batch]) for plus in read_at]
