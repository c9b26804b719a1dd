"""The outcome of a run: theta as a PEFT adapter in adapter/, or, where the whole base is trained, a model in model/."""

import json
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError

from mezo.atomic import SCRATCH
from mezo.errors import UserError
from mezo.models.load import checkpoint_hash
from mezo.models.spec import TrainedSpec
from mezo.run.adapter import as_lora, base_in, read_adapter, read_theta, same_bits, save_adapter
from mezo.run.directory import RunDirectory
from mezo.run.header import INITIAL, content_of, frozen_part
from mezo.run.trajectory import read_header
from mezo.runtimes.base import Runtime, Savable, require


def path(run: RunDirectory, peft: dict | None) -> Path:
    """The directory of a run's outcome; `peft` is of the log's header."""
    return run.model if peft is None else run.adapter


def save(run: RunDirectory, runtime: Runtime) -> None:
    """Write theta as the run's outcome; that of an earlier step gives way."""
    if runtime.spec.peft is None:
        require(runtime, Savable, "--tuning full").save_model(run.model)
    else:
        spec = runtime.spec
        frozen = frozen_part(read_header(run.trajectory), run.path / INITIAL) if spec.frozen else {}
        save_adapter(run.adapter, spec.peft, runtime.theta(), spec.base, frozen)


def prove(runtime: Runtime, first_line: dict, initial: Path | bytes | None, output_dir: str) -> None:
    """Save theta as a run's outcome, load that again, and leave nothing of it: a run is not lost at its end.

    Args:
        runtime: at theta_0.
        first_line: header of the run's log.
        initial: the run's `starting_file`.
        output_dir: of the run, which is not there yet; what is written meanwhile is on the same disk.
    Raises:
        UserError: it cannot be saved or loaded, or is another theta then.
    """
    place = next(parent for parent in Path(output_dir).absolute().parents if parent.is_dir())
    try:
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=place) as scratch:
            run = RunDirectory(Path(scratch))
            if initial is not None:
                (run.path / INITIAL).write_bytes(content_of(initial))
            run.trajectory.write_text(json.dumps(first_line) + "\n")
            save(run, runtime)
            if first_line["peft"] is None:  # theta_0 is the base, whose hash is known: no copy of it is needed
                same = checkpoint_hash(str(run.model), first_line["dtype"]) == first_line["model_hash"]
            else:
                same = difference(run, first_line, runtime.theta()) is None
    except OSError as error:
        raise UserError(f"--output-dir {output_dir} cannot be created: {error.strerror}; choose another") from error
    except (SafetensorError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"what this run would leave in {output_dir} cannot be saved and loaded: {why}") from error
    if not same:
        raise UserError(
            f"--model {first_line['model']}: what this run would leave is not what transformers loads of it: use"
            " another --tuning"
        )


def read(run: RunDirectory, spec: TrainedSpec) -> dict[str, torch.Tensor]:
    """A run's outcome, as `Runtime.load` takes it."""
    if spec.peft is None:
        return _parameters(run, spec.dtype)
    return read_theta(run.adapter, spec.shapes)


def write(run: Path, directory: Path, first_line: dict, theta: dict[str, torch.Tensor]) -> None:
    """Write theta of a log in the form that the outcome of its run has.

    Args:
        run: directory of the run.
        directory: created if needed.
        first_line: of the log.
        theta: float32 by canonical name.
    """
    if first_line["peft"] is None:
        from mezo.models.full import write_parameters

        write_parameters(theta, first_line["model"], first_line["dtype"], directory)
    else:
        save_adapter(directory, first_line["peft"], theta, base_in(first_line), frozen_part(first_line, run / INITIAL))


def difference(run: RunDirectory, first_line: dict, theta: dict[str, torch.Tensor]) -> str | None:
    """None if a run's outcome is exactly this theta (rounded once, if it is a model in 16 bits), else a name.

    Args:
        run: whose outcome is read.
        first_line: of its log.
        theta: float32 by canonical name.
    Returns:
        The first name of a tensor that differs.
    Raises:
        UserError: there is no outcome that can be read.
    """
    if first_line["peft"] is not None:
        whole = as_lora(theta, frozen_part(first_line, run.path / INITIAL))
        shown = {name: tensor for name, tensor in theta.items() if name not in whole}
        different = same_bits(shown, read_theta(run.adapter, {n: t.shape for n, t in theta.items()})) if shown else None
        return different or same_bits(whole, read_adapter(run.adapter))
    saved, dtype = _parameters(run, first_line["dtype"]), getattr(torch, first_line["dtype"])
    rounded = {name: tensor.to(dtype).float() for name, tensor in theta.items()}
    return same_bits(rounded, {name: tensor.float() for name, tensor in saved.items()})


def _parameters(run: RunDirectory, dtype: str) -> dict[str, torch.Tensor]:
    if not run.model.is_dir():
        raise UserError(f"{run.path}: model/ is missing; rebuild it with: mezo replay {run.path} --output-dir NEW")
    from mezo.models.full import read_parameters

    return read_parameters(str(run.model), dtype)
