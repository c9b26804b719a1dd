"""SUBJ: sentences about movies, objective (label 0) or subjective (Pang and Lee 2004)."""

from mezo.data.hub import from_hub, labelled
from mezo.data.task import Prompt, Task

WORDS = (" objective", " subjective")

SUBJ = Task(
    "subj",
    from_hub("SetFit/subj", test="test"),
    prompt=Prompt("{text} This is", WORDS, text_field="text"),
    masked=Prompt("{text} This is<mask>.", WORDS, text_field="text"),
    row=labelled(),
)
