"""What a run kept as a folder for others: adapter or model, a card, and the log that rebuilds it."""

import json
import shutil
from pathlib import Path

import yaml

from mezo.config import Config
from mezo.config.options import PATH
from mezo.errors import UserError
from mezo.run.adapter import PEFT_CONFIG
from mezo.run.directory import RunDirectory
from mezo.run.export import refuse_output
from mezo.run.files import read_object
from mezo.run.trajectory import read_trajectory

COPIED = ("trajectory.jsonl", "config.json", "metrics.jsonl", "result.json", "initial_adapter.safetensors")
"""Files of a run that a replay reads, or that say what it did."""


BASE_OF = "base_model_name_or_path"


def write_share(run: str, folder: str) -> None:
    """Write the folder of a finished run that `upload` sends.

    Args:
        run: its directory.
        folder: to create.
    Raises:
        UserError: the run is not finished, or something is there already.
    """
    directory = RunDirectory(Path(run))
    header, _ = read_trajectory(directory.trajectory)
    if not directory.result.is_file():
        raise UserError(f"{run} is not finished: mezo train --resume {run} carries it on")
    refuse_output(folder)
    outcome = directory.model if header["peft"] is None else directory.adapter
    shutil.copytree(outcome, folder)
    for name in COPIED:
        if (directory.path / name).is_file():
            target = Path(folder) / "run" / name
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(directory.path / name, target)
    _leave_paths_out(Path(folder))
    Path(folder, "README.md").write_text(card(directory, header), encoding="utf-8")


def _leave_paths_out(folder: Path) -> None:
    """Write names in place of absolute paths: where things lay on the machine that trained tells nobody anything.

    What they held is known by its hash, in the header of the log.
    """
    log, config, fields = folder / "run" / "trajectory.jsonl", folder / "run" / "config.json", folder / PEFT_CONFIG
    line, rest = log.read_bytes().split(b"\n", 1)
    first = json.loads(line)
    first["model"] = _name(first["model"])
    if first["peft"] is not None:
        first["peft"][BASE_OF] = _name(first["peft"].get(BASE_OF))
        fields.write_text(json.dumps({**(read := read_object(fields)), BASE_OF: _name(read.get(BASE_OF))}, indent=2))
    log.write_bytes(json.dumps(first).encode() + b"\n" + rest)
    shown = RunDirectory(folder / "run")
    rows = shown.read_metrics()
    for mistake in (mistake for row in rows for mistake in row.get("mistakes", ())):
        mistake["where"] = _name(mistake["where"])
    shown.write_metrics(rows)
    values = read_object(config)
    values.pop("engine_arg", None)  # of the machine alone
    paths = {name for name, option in Config.options().items() if PATH in option.marks} | {"model", "reward"}
    named = {name: _name(value) if name in paths | {"output_dir"} else value for name, value in values.items()}
    config.write_text(json.dumps(named, indent=2))


def _name(path: str | None) -> str | None:
    """The last part of an absolute path; what is none, such as an id of the hub, as it is.

    >>> _name("/home/me/films.csv"), _name("HuggingFaceTB/SmolLM2-135M"), _name("/home/me/judge.py:short")
    ('films.csv', 'HuggingFaceTB/SmolLM2-135M', 'judge.py:short')
    """
    return Path(path).name if path and Path(path).is_absolute() else path


def card(directory: RunDirectory, header: dict) -> str:
    """The model card: base, data, method, figures, and how the log gives the weights."""
    config, result = directory.read_config(), directory.read_result()
    local = Path(header["model"]).is_absolute()
    known = {"tags": ["mezo"], "library_name": "transformers" if header["peft"] is None else "peft"}
    known |= {} if local else {"base_model": header["model"]}
    rows = [
        f"| {split} | {name} | {_shown(result[split]['before'].get(name))} | {_shown(value)} |"
        for split in ("train", "test")
        if split in result
        for name, value in result[split]["after"].items()
        if value is not None
    ]
    figures = ["| split | figure | before | after |", "|---|---|---|---|", *rows] if rows else ["No test set."]
    base = Path(header["model"]).name if local else header["model"]
    options = {
        name: value
        for name, value in config.changes().items()
        if not isinstance(value, str) or not value.startswith("/")
    }
    what = "model" if header["peft"] is None else "adapter"
    base_at = f" --model PATH-OF-{base}" if header["peft"] is None and local else ""
    return "\n".join(
        [
            "---", yaml.safe_dump(known, sort_keys=False).strip(), "---", "",
            f"# An {what} of {base}, trained with forward passes only" if what == "adapter"
            else f"# A model trained from {base} with forward passes only", "",
            f"MeZO (arXiv 2305.17333), update rule {config.method.rule.name}; step {result['best_step']} of"
            f" {result['steps']} was kept.", "",
            *figures, "",
            f"Base weights: SHA-256 `{header['model_hash']}`, {header['dtype']}.",
            f"Data: SHA-256 `{header['data_hash']}`.", "",
            "The log in `run/` gives these weights again, bit for bit:", "",
            "    pip install mezo-kernels", f"    mezo replay run{base_at} --output-dir replayed", "",
            "Options that are not at their defaults:", "", "```json", json.dumps(options, indent=1), "```", "",
        ]
    )  # fmt: skip


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def upload(folder: str, repo: str, private: bool) -> str:
    """Send a folder to the Hugging Face hub; return the address. The one place that talks to it."""
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repo, private=private, exist_ok=True)
        return str(HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="A run of mezo"))
    except Exception as error:  # no account, no network, no such name: the hub says which
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"--repo {repo}: the hub refused it ({why[:200]}); --output-dir writes the folder alone"
        ) from error
