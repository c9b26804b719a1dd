"""RTE: does a passage entail a sentence (Dagan et al. 2005; SuperGLUE)?"""

from mezo.data.hub import from_hub, labelled
from mezo.data.task import Prompt, Task
from mezo.tasks.entailment import joined, masked_prompt

# the hub's labels: entailment, not_entailment
RTE = Task(
    "rte",
    from_hub("aps/super_glue", "rte"),
    prompt=Prompt(
        '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n', ("Yes", "No"), text_field="premise"
    ),
    masked=masked_prompt((" Yes", " No")),
    row=labelled(joined),
)
