"""The layer of the first activation outlier, which `--layers-to-transform auto` trains.

"Dominant-Layer ZO" (arXiv 2606.05516) reports that zeroth-order training of that one layer does as well as of all, and
that it is a property of the model, not of a task. What an outlier is here is the massive activation of Sun et al. 2024
(arXiv 2402.17762).
"""

import dataclasses

import torch

from mezo.errors import UserError
from mezo.models.load import CPU, Checkpoint, load_tokenizer, load_with_new

TEXT = (
    "The museum opened at nine. By noon, more than two hundred visitors had seen the paintings, and the guide, who was"
    " tired, sat down near the door."
)
ABOVE, TIMES = 100.0, 1000.0  # largest activation of a layer, itself and over the median


def first_outlier(checkpoint: Checkpoint) -> tuple[int, list[float]]:
    """The first layer whose output has an activation above 100 and above 1,000 times the median, both in size.

    The model, without its head and in the type of its checkpoint, reads one text of ours: so the layer follows from
    the model alone.

    Args:
        checkpoint: of the model.
    Returns:
        Number of the layer, and of each layer the largest activation over the median.
    Raises:
        UserError: no layer has one, or the model has no list of its layers.
    """
    bare = dataclasses.replace(checkpoint, head="linear")
    dtype = getattr(checkpoint.config.get_text_config(), "dtype", None) or torch.float32
    model, _ = load_with_new(bare, dtype, device=CPU)
    body = model.get_decoder() if checkpoint.reads_images else model
    n = getattr(body.config, "num_hidden_layers", 0)
    layers = None if checkpoint.encoder_decoder else checkpoint.family.layers_of(body, n)
    option = f"--layers-to-transform auto: {checkpoint.name}"
    if not layers:
        raise UserError(f"{option} has no list of its layers: leave it out")
    found = _outputs_of(body, layers, checkpoint)
    ratios = [peak / max(median, 1e-30) for peak, median in found]
    outliers = (i for i, (peak, _) in enumerate(found) if peak > ABOVE and ratios[i] > TIMES)
    chosen = next(outliers, None)
    if chosen is None:
        most = max(ratios)
        raise UserError(
            f"{option} has no layer with an activation above {ABOVE:g} and {TIMES:g} times the median (at most"
            f" {most:.0f} times): name layers"
        )
    return chosen, ratios


@torch.no_grad()
def _outputs_of(
    body: torch.nn.Module, layers: torch.nn.ModuleList, checkpoint: Checkpoint
) -> list[tuple[float, float]]:
    """(largest, median) size of what each layer gives, the text read once."""
    ids = torch.tensor([load_tokenizer(checkpoint.name, checkpoint.trusted)(TEXT)["input_ids"]])
    found: dict[int, tuple[float, float]] = {}

    def see(number: int, out: torch.Tensor | tuple) -> None:
        size = (out if isinstance(out, torch.Tensor) else out[0]).float().abs()
        found[number] = size.max().item(), size.median().item()

    hooks = [layer.register_forward_hook(lambda module, args, out, i=i: see(i, out)) for i, layer in enumerate(layers)]
    try:
        body(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        for hook in hooks:
            hook.remove()
    return [found[i] for i in range(len(layers))]
