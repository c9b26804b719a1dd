"""MPQA: phrases from the news, negative or positive (Wiebe et al. 2005)."""

from mezo.data.hub import from_hub, labelled
from mezo.data.task import Prompt, Task

WORDS = (" terrible", " great")

MPQA = Task(
    "mpqa",
    from_hub("jxm/mpqa", test="test"),
    prompt=Prompt("{sentence} It was", WORDS, text_field="sentence"),
    masked=Prompt("{sentence} It was<mask>.", WORDS, text_field="sentence"),
    row=labelled(),
)
