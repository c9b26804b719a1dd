"""mezo from Python: the commands as functions that take rows, data sets and functions in place of files.

`train` takes the options of `mezo train` by their names, and returns the run as an object.
"""

import functools
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mezo import api
from mezo.config import Config
from mezo.data.files import hold
from mezo.errors import UserError
from mezo.run.adapter import read_adapter
from mezo.run.directory import RunDirectory
from mezo.run.export import export
from mezo.run.replay import rebuild
from mezo.run.trajectory import StepRecord, read_trajectory

Rows = "str | Path | Sequence[Mapping[str, Any]] | datasets.Dataset"
"""A file, folder or hub:OWNER/NAME; a list of dicts; or a `datasets.Dataset`."""


class Run:
    """A run: what it was asked, what it did, and what it left.

    Args:
        path: of its directory.
        result: what result.json holds; None where the run was stopped or paused.
    """

    def __init__(self, path: str | Path, result: dict | None = None):
        self.path, self.result = Path(path), result
        self._directory = RunDirectory(self.path)

    @property
    def config(self) -> Config:
        """Every option of the run."""
        return self._directory.read_config()

    @property
    def metrics(self) -> list[dict]:
        """Its evaluations, oldest first."""
        return self._directory.read_metrics()

    @property
    def steps(self) -> list[StepRecord]:
        """The steps of its log."""
        return read_trajectory(self._directory.trajectory)[1]

    @functools.cached_property
    def theta(self) -> dict[str, torch.Tensor]:
        """What it kept, float32 on the CPU, by name: its adapter, or what its log gives where the base is trained."""
        if read_trajectory(self._directory.trajectory)[0]["peft"] is None:
            return rebuild(self.path)[0]
        return read_adapter(self._directory.adapter)

    def save(
        self, output_dir: str | Path, format: str = "peft", dtype: str = "auto", trust_remote_code: bool = False
    ) -> Path:
        """Write what it kept for others, as `mezo export` does.

        Args:
            output_dir: directory to create.
            format: "peft", "sglang" or "merged".
            dtype: of a merged model.
            trust_remote_code: run the code that the base brings.
        """
        export(str(self.path), str(output_dir), format, dtype, trust_remote_code)
        return Path(output_dir)

    def replay(self, output_dir: str | Path, until: str | int = "best") -> int:
        """Rebuild what it kept from its log, as `mezo replay` does; return the steps applied."""
        return replay(self.path, output_dir, until)

    def resume(self, **options: Any) -> "Run":
        """Go on, as `resume` does."""
        return resume(self.path, **options)

    def report(self, path: str | Path | None = None) -> Path:
        """Write the page with tables and curves, and return where it is: report.html of the run, or `path`."""
        from mezo.report import page  # brings matplotlib

        path = Path(path) if path else self._directory.page
        page.write([str(self.path)], path)
        return path

    def _repr_html_(self) -> str:
        """The page as a notebook shows it: in a frame of its own."""
        from html import escape

        content = escape(self.report().read_text(encoding="utf-8"), quote=True)
        return f'<iframe srcdoc="{content}" width="100%" height="900" frameborder="0"></iframe>'

    def __repr__(self) -> str:
        best = "" if self.result is None else f", best step {self.result['best_step']} of {self.result['steps']}"
        return f"Run({str(self.path)!r}{best})"


def train(
    config: Config | None = None,
    *,
    train: Rows = "",
    dev: Rows = "",
    test: Rows = "",
    reward: Callable[[dict, str], float] | str = "",
    until: int | None = None,
    **options: Any,
) -> Run:
    """Fine-tune a model with forward passes only, as `mezo train` does.

    Args:
        config: the options as a `Config`, in place of all others.
        train, dev, test: data; see `Rows`. Columns are found as those of files are.
        reward: a function of an example's fields and the text written for it, or file.py:function; --objective is
            reward then, unless it is given.
        until: number of steps after which it pauses.
        options: those of `mezo train`, with underscores: model="...", lr=1e-3. Without output_dir the run is under
            runs/, by the time.
    Returns:
        The run. Rows and functions are not copied to its directory: give them again to `resume` in another process.
    Raises:
        UserError: before anything is written.

    >>> mezo.train(model="HuggingFaceTB/SmolLM2-135M", train=[{"text": "Fun.", "label": 1}], ...)  # doctest: +SKIP
    """
    if config is None:
        given = {**options, **_data(train=train, dev=dev, test=test), **_reward(reward)}
        if given.get("reward"):
            given.setdefault("objective", "reward")
        given.setdefault("output_dir", time.strftime("runs/%Y%m%d-%H%M%S"))
        config = Config.of(**{name: _plain(value) for name, value in given.items()})
    elif options or reward or not all(isinstance(rows, str) and not rows for rows in (train, dev, test)):
        raise UserError("mezo.train takes a Config or options, not both: config.replace(...) changes one")
    return Run(config.machine.output_dir, api.train(config, until))


def resume(
    path: str | Path,
    *,
    train: Rows = "",
    dev: Rows = "",
    test: Rows = "",
    reward: Callable[[dict, str], float] | str = "",
    until: int | None = None,
    trust_reward: bool = False,
    **options: Any,
) -> Run:
    """Carry a run on to its last step, to the same bits as if it had never stopped, as `mezo train --resume` does.

    Args:
        path: run directory.
        train, dev, test, reward: what was given to `train` as rows or a function, where this is another process.
        until: number of steps after which it pauses again.
        trust_reward: run the code of the reward that the run names, if it lies in a file.
        options: those that say where, how or how far a run is computed, such as steps.
    """
    _data(train=train, dev=dev, test=test)
    source = _reward(reward).get("reward", "")
    machine = {name: _plain(value) for name, value in options.items()}
    result = api.resume(str(path), machine=machine, until=until, reward=source, trust_reward=trust_reward)
    return Run(path, result)


def evaluate(
    target: str | Path | Run | None = None,
    *,
    train: Rows = "",
    dev: Rows = "",
    test: Rows = "",
    **options: Any,
) -> dict[str, dict]:
    """Score a run, an adapter, or with model="..." a model without one, as `mezo eval` does.

    Args:
        target: a `Run`, or the directory of a run or an adapter.
        train, dev, test: data; a run brings its own.
        options: those of `mezo eval`.
    Returns:
        Figures by split.
    """
    given = {name: _plain(value) for name, value in options.items()} | _data(train=train, dev=dev, test=test)
    path = target.path if isinstance(target, Run) else target
    return api.evaluate_target(given, Path(path) if path else None)


def replay(run: str | Path | Run, output_dir: str | Path, until: str | int = "best") -> int:
    """Rebuild what a run kept from its log, as `mezo replay` does.

    Args:
        run: a `Run`, or its directory.
        output_dir: directory to create.
        until: "best", "last" or a number of steps.
    Returns:
        Steps applied.
    """
    return api.replay(str(run.path if isinstance(run, Run) else run), str(output_dir), str(until))


def _data(**splits: Any) -> dict[str, str]:
    """train_file, dev_file and test_file of what was given for them."""
    files = {}
    for split, rows in splits.items():
        if isinstance(rows, str | Path):
            files |= {f"{split}_file": str(rows)} if str(rows) else {}
        elif hasattr(rows, "column_names") and isinstance(rows.column_names, list):
            files[f"{split}_file"] = hold(f"{split}-{rows._fingerprint}", rows)
        elif isinstance(rows, Sequence) and all(isinstance(row, Mapping) for row in rows):
            name = hashlib.sha256(json.dumps(list(map(dict, rows)), default=str).encode()).hexdigest()[:12]
            files[f"{split}_file"] = hold(f"{split}-{name}", rows)
        else:
            raise UserError(
                f"{split} must be a path, a list of dicts or a datasets.Dataset, got {type(rows).__name__}: a"
                " DatasetDict has one of these for each split"
            )
    return files


def _reward(reward: Callable | str) -> dict[str, str]:
    if not callable(reward):
        return {"reward": reward} if reward else {}
    from mezo.data.rewards import hash_of_function

    name = getattr(reward, "__name__", type(reward).__name__)
    return {"reward": f"{hold(f'reward-{hash_of_function(reward)[:12]}', reward)}:{name}"}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
