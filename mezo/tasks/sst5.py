"""SST-5: movie review sentences, very negative to very positive (Socher et al. 2013)."""

from mezo.data.hub import from_hub, labelled
from mezo.data.task import Prompt, Task

WORDS = (" terrible", " bad", " okay", " good", " great")

SST5 = Task(
    "sst5",
    from_hub("SetFit/sst5", test="test"),
    prompt=Prompt("{text} It was", WORDS, text_field="text"),
    masked=Prompt("{text} It was<mask>.", WORDS, text_field="text"),
    row=labelled(),
)
