"""Run directories: their paths, and the lock that lets one process in at a time."""

import json
import os
from pathlib import Path

from filelock import FileLock, Timeout

from mezo.atomic import remove_partial, replacing
from mezo.config import Config
from mezo.errors import UserError
from mezo.run.feedback import FILE as FEEDBACK
from mezo.run.files import drop_torn_line, parsed, read_lines, read_object, replace_file
from mezo.run.header import INITIAL, content_of, lengthened
from mezo.run.schema import Metrics, Result, validated
from mezo.run.trajectory import read_trajectory


class RunDirectory:
    """Paths of a run, and the OS lock that keeps a second process out; the lock dies with its process.

    Use `create` for a new run and `open` for one to resume.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config, self.trajectory = path / "config.json", path / "trajectory.jsonl"
        self.metrics, self.result = path / "metrics.jsonl", path / "result.json"
        self.adapter, self.model = path / "adapter", path / "model"
        self.page, self.tensorboard = path / "report.html", path / "tensorboard"
        self.feedback, self.launch = path / FEEDBACK, path / ".launch"
        self._lock = None

    @classmethod
    def create(cls, path: str, config: Config, first_line: dict, initial: Path | bytes | None = None) -> "RunDirectory":
        """Make the directory with its config, log header and `starting_file`, whole or not at all, and lock it.

        Args:
            path: of the directory; what is missing above it is made.
            config: the run's.
            first_line: header of its log.
            initial: `starting_file`: a safetensors file or its bytes; None where theta_0 is no file.
        Raises:
            UserError: it exists, or cannot be made.
        """
        refuse_existing(path)
        run = cls(Path(path))
        try:
            if not run.path.parent.exists():
                run.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(run.path) as unborn:
                part = cls(unborn)
                part.path.mkdir()
                part._acquire()
                if initial is not None:
                    part.path.joinpath(INITIAL).write_bytes(content_of(initial))
                part.launch.write_text(launch_id())
                part.config.write_text(config.to_json())
                part.trajectory.write_text(json.dumps(first_line) + "\n")
                part.metrics.touch()
        except OSError as error:
            raise UserError(f"--output-dir {path} cannot be created: {error.strerror}; choose another") from error
        run._lock = part._lock
        return run

    @classmethod
    def open(cls, path: str) -> "RunDirectory":
        """Lock an existing run. Raises UserError if it is none, or in use."""
        run = cls(Path(path))
        if not run.config.is_file() or not run.trajectory.is_file():
            raise UserError(f"--resume {path}: not a run directory (no config.json or no trajectory.jsonl there)")
        run._refuse_links()
        run._acquire()
        for directory in (run.path, run.adapter):
            remove_partial(directory)
        run.metrics.touch()
        drop_torn_line(run.trajectory)
        drop_torn_line(run.metrics)
        return run

    def read_config(self) -> Config:
        """The configuration the run was started with; each command says anew that it trusts code of the model."""
        try:
            return Config.of_run(read_object(self.config) | {"trust_remote_code": False})
        except UserError as error:
            raise UserError(f"{self.path}: not a run directory with a readable config.json ({error})") from error

    def lengthen(self, config: Config) -> None:
        """Give the run more steps: the log's header says so, then config.json.

        Args:
            config: the run's, with the new number of steps.
        """
        first_line, records = read_trajectory(self.trajectory)
        before = self.read_config().method.steps
        lines = self.trajectory.read_bytes().split(b"\n", 1)
        first = json.dumps(lengthened(first_line, len(records), before, config.method.steps)).encode()
        replace_file(self.trajectory, first + b"\n" + lines[1])
        replace_file(self.config, config.to_json().encode())

    def read_metrics(self) -> list[dict]:
        """Evaluations so far, oldest first."""
        if not self.metrics.exists():
            return []
        lines = ((f"{self.metrics}: line {number}", line) for number, line in read_lines(self.metrics))
        return [validated(Metrics, parsed(line, where), where) for where, line in lines]

    def write_metrics(self, rows: list[dict]) -> None:
        """Replace the evaluations."""
        replace_file(self.metrics, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def read_result(self) -> dict:
        """result.json of a finished run; a null is a figure that the run does not have."""
        result = validated(Result, read_object(self.result), str(self.result))
        return {name: value for name, value in result.items() if value is not None}

    def _refuse_links(self) -> None:
        """Raise UserError for a link in place of a file: what is written to the run would be written elsewhere."""
        for path in (self.path / ".lock", *(own for own in vars(self).values() if isinstance(own, Path))):
            if path != self.path and path.is_symlink():
                raise UserError(f"{path} is a symbolic link, which is not written through: put the file itself there")

    def _acquire(self) -> None:
        self._lock = FileLock(self.path / ".lock")  # the OS frees it where its process ends
        try:
            self._lock.acquire(blocking=False)
        except Timeout as error:
            raise UserError(
                f"{self.path}: another process is training in this run directory; wait or stop it"
            ) from error

    def release(self) -> None:
        """Let another process in; nothing to do where this one has no lock, as on a rank above 0."""
        if self._lock:
            self._lock.release()


def launch_id() -> str:
    """Names the torchrun launch this process belongs to, across its restarts; empty where nothing does."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return "" if name == "none" else name  # torchrun's --rdzv-id where it draws none


def refuse_existing(path: str) -> None:
    """Raise UserError if a run directory (or anything else) is there already."""
    if Path(path).exists():
        raise UserError(f"--output-dir {path} exists and is never overwritten: choose another, or use --resume {path}")


def best_step(metrics: list[dict]) -> int | None:
    """Updates applied at the best dev evaluation (the earliest of equals), or None without a dev set."""
    best = [row["step"] for row in metrics if row.get("is_best")]
    return best[-1] if best else None
