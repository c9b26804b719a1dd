"""MPQA: phrases from the news, negative or positive (Wiebe et al. 2005)."""

from mezo.tasks.base import Prompt, Task
from mezo.tasks.hub import from_hub, labelled

WORDS = (" terrible", " great")

MPQA = Task(
    "mpqa",
    from_hub("jxm/mpqa", test="test"),
    prompt=Prompt("{sentence} It was", WORDS, text_field="sentence"),
    masked=Prompt("{sentence} It was<mask>.", WORDS, text_field="sentence"),
    row=labelled(),
)
