"""MR: movie review sentences, negative or positive (Pang and Lee 2005)."""

from mezo.data.hub import from_hub, labelled
from mezo.data.task import Prompt, Task

WORDS = (" terrible", " great")

MR = Task(
    "mr",
    from_hub("cornell-movie-review-data/rotten_tomatoes", test="test"),
    prompt=Prompt("{text} It was", WORDS, text_field="text"),
    masked=Prompt("{text} It was<mask>.", WORDS, text_field="text"),
    row=labelled(),
)
