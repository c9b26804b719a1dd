"""Data parallelism by scalars: ranks exchange losses, never weights, and hold bit-identical theta.

Every rank applies the same seeds and coefficients, so a few float64 numbers a step are all that is sent.
"""

import datetime
import hashlib
import itertools
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist

from mezo.errors import RunError

PATIENCE = datetime.timedelta(hours=12)  # rank 0 evaluates while the others wait; a dead rank is noticed at once
_meetings = itertools.count()


class Ranks:
    """The processes of one run: as many as torchrun started, or this one alone.

    `interrupted` is set by this process when it is asked to stop.

    >>> Ranks().gather([1.0, 2.0])
    [[1.0, 2.0]]
    """

    def __init__(self):
        self.rank, self.size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self.bytes_exchanged = 0
        self.interrupted = self._stopping = False
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=PATIENCE, rank=self.rank, world_size=self.size, store=self._store())

    def _store(self) -> dist.Store:
        """Where ranks find each other; addresses before a restart, or of this process's last run, are out of sight."""
        hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, self.size, is_master=self.rank == 0 and not hosted)
        return dist.PrefixStore(f"mezo/{self.attempt}/{next(_meetings)}", store)

    @property
    def restarted(self) -> bool:
        """True if torchrun has started the ranks again after one of them died."""
        return self.attempt > 0

    @property
    def leads(self) -> bool:
        """True in the one process that writes the run directory and evaluates."""
        return self.rank == 0

    @property
    def stopping(self) -> bool:
        """True once any rank was interrupted; all ranks learn of it in the same exchange, and stop after one step."""
        return self._stopping or (self.size == 1 and self.interrupted)

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """The values of every rank, in the order of ranks; as many from each. `interrupted` travels with them."""
        if self.size == 1:
            return [list(values)]
        sent = torch.tensor([float(self.interrupted), *values], dtype=torch.float64)
        parts = [torch.empty_like(sent) for _ in range(self.size)]
        try:
            dist.all_gather(parts, sent)
        except RuntimeError as error:
            raise RunError(
                f"rank {self.rank} lost another rank ({str(error).splitlines()[0]}); resume the run"
            ) from error
        self.bytes_exchanged += sent.nbytes * self.size
        gathered = [part.tolist() for part in parts]
        self._stopping |= any(interrupted for interrupted, *_ in gathered)
        return [values for _, *values in gathered]

    def close(self) -> None:
        """Wait for the other ranks and part; a rank that leaves early takes the connections of the others down."""
        if self.size > 1:
            self.gather([0.0])
            dist.destroy_process_group()

    def check_equal(self, theta: dict[str, torch.Tensor], step: int, remedy: str = "resume the run") -> None:
        """Raise RunError naming the ranks whose theta differs from rank 0's in any bit."""
        digest = hashlib.sha256()
        for name, tensor in theta.items():
            digest.update(name.encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy())
        # 48 bits are an exact float64
        hashes = [values[0] for values in self.gather([float(int.from_bytes(digest.digest()[:6]))])]
        different = [rank for rank, value in enumerate(hashes) if value != hashes[0]]
        if different:
            raise RunError(f"step {step}: theta of rank {different[0]} differs from that of rank 0; {remedy}")
