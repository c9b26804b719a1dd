"""SNLI: does a picture's caption entail a sentence (Bowman et al. 2015)? Pairs without a gold label are left out."""

from mezo.data.hub import from_hub, labelled
from mezo.data.task import Task
from mezo.tasks.entailment import joined, masked_prompt

# the hub's labels: entailment, neutral, contradiction
SNLI = Task(
    "snli",
    from_hub("stanfordnlp/snli"),
    masked=masked_prompt((" Yes", " Maybe", " No")),
    row=labelled(joined),
)
