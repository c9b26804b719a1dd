"""The memory that a kernel sees: a copy of its tensors, in which every byte that is no element is a guard."""

import ctypes
from collections.abc import Iterable

import numpy as np
import torch

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
ELEMENT, WRITABLE, STORED = 1, 2, 4  # bits of a byte's state; a byte with none of them is a guard
GAP = 64  # guard bytes at least between two storages


class AccessError(Exception):
    """A kernel reads or writes where it must not."""


class Global:
    """Tensors on the host by their addresses, for the length of one launch.

    Args:
        tensors: what the launch may read; those of floating point it may also write, each element once, and not read
            again afterwards: another thread might.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]):
        tensors = [t for t in tensors if t.numel()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self.starts = np.array(sorted(storages), np.uint64)
        self.sizes = np.array([storages[start] for start in sorted(storages)], np.uint64)
        # the place of a storage in the copy is aligned as its address is
        places, end = [], GAP
        for start, size in sorted(storages.items()):
            places.append(end + (start - end) % GAP)
            end = places[-1] + size + GAP
        self.places = np.array(places, np.uint64)
        self.bytes, self.state = (np.zeros(end + -end % GAP, np.uint8) for _ in range(2))
        for copy, original in self._storages():
            copy[:] = original
        for tensor in tensors:
            self._mark(tensor)

    def _storages(self):
        """(copy, original) of the bytes of each storage."""
        for start, size, place in zip(*(a.tolist() for a in (self.starts, self.sizes, self.places)), strict=True):
            original = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start))
            yield self.bytes[place : place + size], original

    def _mark(self, tensor: torch.Tensor) -> None:
        size, start = tensor.element_size(), tensor.untyped_storage().data_ptr()
        place = int(self.places[np.searchsorted(self.starts, start)])
        strides = (*(stride * size for stride in tensor.stride()), 1)
        at = place + tensor.data_ptr() - start
        own = torch.from_numpy(self.state).as_strided((*tensor.shape, size), strides, at)
        own |= ELEMENT | WRITABLE if tensor.is_floating_point() else ELEMENT

    def write_back(self) -> None:
        """Copy what was stored to the tensors."""
        for copy, original in self._storages():
            original[:] = copy

    def load(self, address: np.ndarray, count: int, bits: int) -> np.ndarray:
        """`count` adjacent numbers of `bits` bits from each address: unsigned, shape (addresses, count)."""
        at, size = self._locate(address, count * bits // 8)
        state = self._states(at, size)
        self._require((state & ELEMENT).all(1), address, size, "a load", "not inside one tensor of the call")
        self._require(~(state & STORED).any(1), address, size, "a load", "stored to by the same launch")
        return self.bytes.view(UNSIGNED[bits]).reshape(-1, count)[at // size]

    def store(self, address: np.ndarray, values: np.ndarray) -> None:
        """Store rows of adjacent unsigned numbers, shape (addresses, count), at each address."""
        at, size = self._locate(address, values.shape[1] * values.itemsize)
        state = self._states(at, size)
        self._require((state & WRITABLE).all(1), address, size, "a store", "not inside one tensor that it may write")
        once = ~(state & STORED).any(1)
        once[np.setdiff1d(np.arange(len(at)), np.unique(at, return_index=True)[1])] = False
        self._require(once, address, size, "a store", "stored to twice")
        self.bytes.view(values.dtype).reshape(-1, values.shape[1])[at // size] = values
        self.state.reshape(-1, size)[at // size] |= STORED

    def _states(self, at: np.ndarray, size: int) -> np.ndarray:
        return self.state.reshape(-1, size)[at // size]

    def _locate(self, address: np.ndarray, size: int) -> tuple[np.ndarray, int]:
        """Places in the copy of accesses of `size` bytes, and the size."""
        self._require(address % np.uint64(size) == 0, address, size, "an access", f"not aligned to {size} bytes")
        block = np.searchsorted(self.starts, address, "right") - 1
        offset = address - self.starts[np.maximum(block, 0)]
        inside = (block >= 0) & (offset < self.sizes[np.maximum(block, 0)])
        self._require(inside, address, size, "an access", "in no tensor of the call")
        return (self.places[block] + offset).astype(np.int64), size

    @staticmethod
    def _require(right: np.ndarray, address: np.ndarray, size: int, what: str, why: str) -> None:
        if not right.all():
            raise AccessError(f"{what} of {size} bytes at {int(address[~right][0]):#x} is {why}")


class Shared:
    """Shared memory of all programs of a launch, which a barrier must order.

    Args:
        programs: how many.
        size: bytes of one.
    """

    FREE, MANY = np.int32(-1), np.int32(-2)

    def __init__(self, programs: int, size: int):
        self.bytes = np.zeros((programs, size + -size % 16), np.uint8)
        # the thread that stored and loaded a byte since the last barrier
        self.stored, self.loaded = (np.full(self.bytes.shape, self.FREE, np.int32) for _ in range(2))

    def barrier(self, programs: np.ndarray) -> None:
        """What the threads of these programs did before is visible to all of them from now on."""
        self.stored[programs] = self.loaded[programs] = self.FREE

    def load(self, program: np.ndarray, thread: np.ndarray, address: np.ndarray, count: int, bits: int) -> np.ndarray:
        """As `Global.load`, of the own program of each thread."""
        spot = self._spot(program, address, count * bits // 8)
        self._order(self.stored[spot], thread)
        before = self.loaded[spot]
        alone = (before == self.FREE) | (before == thread[:, None])
        self.loaded[spot] = np.where(alone, thread[:, None], self.MANY)
        return np.ascontiguousarray(self.bytes[spot]).view(UNSIGNED[bits])

    def store(self, program: np.ndarray, thread: np.ndarray, address: np.ndarray, values: np.ndarray) -> None:
        """As `Global.store`, to the own program of each thread."""
        spot = self._spot(program, address, values.shape[1] * values.itemsize)
        self._order(self.stored[spot], thread)
        self._order(self.loaded[spot], thread)
        given = np.ascontiguousarray(values).view(np.uint8)
        self.bytes[spot], self.stored[spot] = given, thread[:, None]
        # threads that hold copies of one value may store it together
        if (self.bytes[spot] != given).any():
            raise AccessError("two threads store different values to one place of shared memory")

    def _spot(self, program: np.ndarray, address: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        if (address % size).any() or (address + size > self.bytes.shape[1]).any():
            raise AccessError(f"an access of {size} bytes of shared memory is not aligned, or beyond its end")
        return program[:, None], address.astype(np.int64)[:, None] + np.arange(size)

    def _order(self, others: np.ndarray, thread: np.ndarray) -> None:
        if ((others != self.FREE) & (others != thread[:, None])).any():
            raise AccessError("two threads use one place of shared memory without a barrier in between")
