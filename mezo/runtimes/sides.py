"""Which copies of theta a step scores: both signs of every perturbation, or one sign of each and theta once."""

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

Found = TypeVar("Found")


class Sides:
    """Pairs of what is found at the copies of theta that a runtime holds, named plus0, minus0, plus1, ...

    One-sided, the second of each pair is what is found at theta itself, which minus0 holds: n perturbations cost n + 1
    forward passes of a batch, in however many calls they are held.

    Args:
        one_sided: of the rule.

    >>> sides, asked = Sides(one_sided=True), []
    >>> def read(names):
    ...     asked.append(names)
    ...     return names
    >>> sides.pairs(2, "batch", read), sides.pairs(1, "batch", read)
    ([('plus0', 'minus0'), ('plus1', 'minus0')], [('plus0', 'minus0')])
    >>> asked
    [['plus0', 'plus1', 'minus0'], ['plus0']]
    """

    def __init__(self, one_sided: bool):
        self.one_sided = one_sided
        self._at_theta: dict[Hashable, object] = {}
        self._equal = False

    def stepped(self, updates: Sequence) -> None:
        """The perturbed copies were written anew; what is known of theta holds until there is an update."""
        self._equal = False
        if updates:
            self._at_theta.clear()

    def loaded(self) -> None:
        """Theta is another."""
        self._at_theta.clear()

    def equalised(self) -> None:
        """All copies hold theta, to be scored as often as is asked."""
        self._equal = True

    def pairs(self, held: int, batch: Hashable, read: Callable[[list[str]], list[Found]]) -> list[tuple[Found, Found]]:
        """(found at plus k, found at minus k or theta) of each perturbation.

        Args:
            held: perturbations.
            batch: names what is read; theta is read once for each.
            read: what is found at the copies of these names, in order.
        """
        if not self.one_sided or self._equal:
            found = read([f"{sign}{k}" for k in range(held) for sign in ("plus", "minus")])
            return list(zip(found[::2], found[1::2], strict=True))
        names, known = [f"plus{k}" for k in range(held)], batch in self._at_theta
        found = list(read(names if known else [*names, "minus0"]))
        if not known:
            self._at_theta[batch] = found.pop()
        return [(plus, self._at_theta[batch]) for plus in found]
