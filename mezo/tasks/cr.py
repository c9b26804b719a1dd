"""CR: customer reviews of products, negative or positive (Hu and Liu 2004)."""

from mezo.tasks.base import Prompt, Task
from mezo.tasks.hub import from_hub, labelled

WORDS = (" terrible", " great")

CR = Task(
    "cr",
    from_hub("SetFit/CR", test="test"),
    prompt=Prompt("{text} It was", WORDS, text_field="text"),
    masked=Prompt("{text} It was<mask>.", WORDS, text_field="text"),
    row=labelled(),
)
