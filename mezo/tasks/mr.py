"""MR: movie review sentences, negative or positive (Pang and Lee 2005)."""

from mezo.tasks.base import Prompt, Task
from mezo.tasks.hub import from_hub, labelled

WORDS = (" terrible", " great")

MR = Task(
    "mr",
    from_hub("cornell-movie-review-data/rotten_tomatoes", test="test"),
    prompt=Prompt("{text} It was", WORDS, text_field="text"),
    masked=Prompt("{text} It was<mask>.", WORDS, text_field="text"),
    row=labelled(),
)
