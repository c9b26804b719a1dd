"""CR: customer reviews of products, negative or positive (Hu and Liu 2004)."""

from mezo.data.hub import from_hub, labelled
from mezo.data.task import Prompt, Task

WORDS = (" terrible", " great")

CR = Task(
    "cr",
    from_hub("SetFit/CR", test="test"),
    prompt=Prompt("{text} It was", WORDS, text_field="text"),
    masked=Prompt("{text} It was<mask>.", WORDS, text_field="text"),
    row=labelled(),
)
