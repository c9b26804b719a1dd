"""Which version of the adapter lies in which slot of the engine, and who still reads it."""

import itertools
import threading
from dataclasses import dataclass, field

from mezo.errors import UserError

NAME = "mezo"
"""Of the promoted adapter; NAME@STEP is that after so many steps of the run."""


class Busy(RuntimeError):
    """Every slot that a pinned version may have is in use."""


@dataclass
class Version:
    """What a slot holds.

    Args:
        slot: name of the adapter that the engine knows it by.
        salt: of its cache namespace; no two versions have the same.
        step: steps of the run that made it; None while it is being written.
        readers: requests in flight.
        used: when it was last asked for, as a count.
    """

    slot: str
    salt: str = ""
    step: int | None = None
    readers: int = field(default=0, compare=False)
    used: int = field(default=0, compare=False)

    @property
    def name(self) -> str:
        """As users name it."""
        return f"{NAME}@{self.step}"


class Versions:
    """The versions at hand. A slot is written anew only while no request reads it, so a request ends under the version
    that it began under. All methods may be called from any thread.

    Args:
        slots: their names; two at least, for the promoted version and the one that follows it.

    >>> versions = Versions(["a", "b", "c"])
    >>> slot = versions.reserve()
    >>> versions.fill(slot, 0), versions.promote(0)
    (None, None)
    >>> reading = versions.take(None)
    >>> reading.name, versions.steps()
    ('mezo@0', [0])
    """

    def __init__(self, slots: list[str]):
        self._versions = [Version(slot) for slot in slots]
        self._promoted: Version | None = None
        self._changed, self._clock, self._salts = threading.Condition(), itertools.count(1), itertools.count()

    @property
    def promoted(self) -> int | None:
        """Step of the promoted version."""
        return None if self._promoted is None else self._promoted.step

    def steps(self) -> list[int]:
        """Steps of the versions at hand."""
        with self._changed:
            return sorted(version.step for version in self._versions if version.step is not None)

    def take(self, step: int | None) -> Version | None:
        """Begin to read a version; None where it is not at hand.

        Args:
            step: which; None is the promoted one.
        """
        with self._changed:
            version = self._promoted if step is None else self._find(step)
            if version is not None:
                version.readers += 1
                version.used = next(self._clock)
            return version

    def release(self, version: Version) -> None:
        """A request that read a version is answered."""
        with self._changed:
            version.readers -= 1
            self._changed.notify_all()

    def reserve(self, patience: float | None = 0.0, spare: int = 0) -> Version:
        """A slot that nobody reads, to be written: the one that was asked for longest ago. Its version is gone.

        Args:
            patience: seconds that may be waited for one; None is for ever.
            spare: slots that have to stay beside it and the promoted one, for the next promotion.
        Raises:
            Busy: there is none.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._free()) > spare, patience):
                raise Busy("all versions at hand are in use: ask again later, or start the server with more --versions")
            version = min(self._free(), key=lambda each: each.used)
            version.step, version.used = None, next(self._clock)
            version.readers = 1  # the writer's
            return version

    def fill(self, version: Version, step: int | None) -> None:
        """A reserved slot holds a version now; None: it could not be written."""
        with self._changed:
            version.step, version.salt = step, f"mezo-served-{next(self._salts)}"
            version.readers -= 1
            self._changed.notify_all()

    def promote(self, step: int) -> None:
        """Requests that name no step read this version from now on; it is at hand."""
        with self._changed:
            self._promoted = self._find(step)
            self._changed.notify_all()

    def _find(self, step: int) -> Version | None:
        return next((version for version in self._versions if version.step == step), None)

    def _free(self) -> list[Version]:
        return [version for version in self._versions if not version.readers and version is not self._promoted]


def step_of(name: str) -> int | None:
    """The step that a user names, None for the promoted version.

    Raises:
        UserError: it is no name of a version.

    >>> step_of("mezo"), step_of("mezo@1200")
    (None, 1200)
    """
    base, at, step = name.partition("@")
    if base == NAME and (not at or (step.isdecimal() and step.isascii() and len(step) < 10)):
        return int(step) if at else None
    raise UserError(f"adapter {name!r:.60} is not served: expected {NAME} or {NAME}@STEP after the model's name")
