"""What a run kept, written for others to use."""

from pathlib import Path

from mezo.errors import UserError
from mezo.models.families import complete_fields, complete_stacks
from mezo.models.load import Checkpoint
from mezo.models.merge import cast, merge
from mezo.run.adapter import (
    WEIGHTS,
    base_of,
    check_base,
    check_weights,
    head_of,
    is_prefix,
    quantised_here,
    read_adapter,
    read_peft_config,
    save_adapter,
    shapes_in,
)
from mezo.run.directory import RunDirectory


def export(run: str, output_dir: str, form: str = "peft", dtype: str = "auto", trusted: bool = False) -> None:
    """Write what a run kept for others to use.

    Args:
        run: run directory, or any adapter directory.
        output_dir: directory to create.
        form: "peft", an adapter; "sglang", the same with zeros for the projections that SGLang's loader wants beside
            trained ones; "merged", the base model with the adapter added in float32 and cast once, or the model that
            was trained as a whole.
        dtype: of the merged model; auto is that of the base checkpoint.
        trusted: code that the base brings is run.
    """
    refuse_output(output_dir)
    if (model := RunDirectory(Path(run)).model).is_dir():
        if form != "merged":
            raise UserError(f"--format {form}: {run} trained the whole model, there is no adapter; use merged")
        cast(model, RunDirectory(Path(run)).read_config().model.base, Path(output_dir), dtype)
        return
    adapter = Path(run) / "adapter" if (Path(run) / "adapter").is_dir() else Path(run)
    peft = read_peft_config(adapter)
    if is_prefix(peft) and form != "peft":
        raise UserError(f"--format {form}: the adapter is a prefix, which is no change of weights; use peft")
    head, model = head_of(peft), peft["base_model_name_or_path"]
    if (head == "linear" and form != "peft") or (head != "model" and form == "sglang"):
        raise UserError(f"--format {form}: the adapter has a {head} head, which this form cannot hold; use peft")
    if form == "sglang" and (peft.get("rank_pattern") or peft.get("alpha_pattern")):
        raise UserError("--format sglang: the adapter has ranks or scales of single modules; use peft or merged")
    if form == "merged":
        check_base(adapter, model, head, trusted=trusted)
        check_weights(adapter / WEIGHTS)
        base = base_of(adapter) or {"dtype": "float32"}
        packed = quantised_here(base), base["dtype"]
        merge(model, adapter, Path(output_dir), dtype, head, shapes_in(adapter / WEIGHTS), *packed, trusted)
        return
    tensors = read_adapter(adapter)
    if form == "sglang":
        tensors = complete_stacks(Checkpoint.of(model, trusted=trusted).config, tensors)
        peft = complete_fields(peft, tensors)
    save_adapter(Path(output_dir), peft, tensors, base_of(adapter))


def refuse_output(path: str) -> None:
    """Raise UserError if something is where a new directory is to be made."""
    if Path(path).exists():
        raise UserError(f"--output-dir {path} exists and is never overwritten: choose another")
