"""One tokenised example: what a runtime scores."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Example:
    """One tokenised example.

    Args:
        prompt: token ids, special tokens included.
        options: token ids of each answer option; the answer follows the prompt, or fills its mask.
        label: index of the right option.
        mask: position of the mask token in `prompt` (masked language models; one-token options only), else None.
        pooled: options are outputs of a head for classes, ((0,), (1,), ...), that reads the whole `prompt`.
        references: every right answer as text, where text is judged.
        names: what each option says as an answer, where it is judged as text; else ().
        fields: the task's own, where a reward reads them.
        where: file and line, for error messages.
    """

    prompt: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]
    label: int
    mask: int | None = None
    pooled: bool = False
    references: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    fields: Mapping[str, object] = field(default_factory=dict, compare=False)
    where: str = field(default="", compare=False)
