"""What a run keeps of theta: a PEFT adapter in adapter/, or, where the base itself is trained, a model in model/."""

from pathlib import Path

import torch

from mezo.errors import UserError
from mezo.models.spec import TrainedSpec
from mezo.run.adapter import load_adapter, read_adapter, same_bits, save_adapter
from mezo.run.directory import RunDirectory
from mezo.runtimes.base import Runtime, Savable, require


def place(run: RunDirectory, peft: dict | None) -> Path:
    """The directory of a run that it is kept in; `peft` is of the log's header."""
    return run.model if peft is None else run.adapter


def keep(run: RunDirectory, runtime: Runtime) -> None:
    """Write theta; what was kept of an earlier step gives way."""
    if runtime.spec.peft is None:
        require(runtime, Savable, "--tuning full").save_model(run.model)
    else:
        save_adapter(run.adapter, runtime.spec.peft, runtime.theta())


def read(run: RunDirectory, spec: TrainedSpec) -> dict[str, torch.Tensor]:
    """What a run kept, as `Runtime.load` takes it."""
    if spec.peft is None:
        return _parameters(run, spec.dtype)
    return load_adapter(run.adapter, spec.shapes)


def write(directory: Path, first_line: dict, theta: dict[str, torch.Tensor]) -> None:
    """Write theta of a log, as the run that wrote the log keeps it.

    Args:
        directory: created if needed.
        first_line: of the log.
        theta: float32 by canonical name.
    """
    if first_line["peft"] is None:
        from mezo.models.full import write_parameters

        write_parameters(theta, first_line["model"], first_line["dtype"], directory)
    else:
        save_adapter(directory, first_line["peft"], theta)


def difference(run: RunDirectory, first_line: dict, theta: dict[str, torch.Tensor]) -> str | None:
    """None if a run keeps exactly this theta (rounded once, if it is a model in 16 bits), else the first other name."""
    if first_line["peft"] is not None:
        return same_bits(theta, read_adapter(run.adapter))
    found, dtype = _parameters(run, first_line["dtype"]), getattr(torch, first_line["dtype"])
    rounded = {name: tensor.to(dtype).float() for name, tensor in theta.items()}
    return same_bits(rounded, {name: tensor.float() for name, tensor in found.items()})


def _parameters(run: RunDirectory, dtype: str) -> dict[str, torch.Tensor]:
    if not run.model.is_dir():
        raise UserError(f"{run.path}: model/ is missing; rebuild it with: mezo replay {run.path} --output-dir NEW")
    from mezo.models.full import read_parameters

    return read_parameters(str(run.model), dtype)
