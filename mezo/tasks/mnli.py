"""MNLI: does a sentence entail another, in ten genres (Williams et al. 2018; GLUE)? Tested on the matched genres."""

from mezo.data.hub import from_hub, labelled
from mezo.data.task import Task
from mezo.tasks.entailment import joined, masked_prompt

# the hub's labels: entailment, neutral, contradiction
MNLI = Task(
    "mnli",
    from_hub("nyu-mll/glue", "mnli", test="validation_matched"),
    masked=masked_prompt((" Yes", " Maybe", " No")),
    row=labelled(joined),
)
