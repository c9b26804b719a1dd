"""CB: is an embedded clause meant to be true (de Marneffe et al. 2019; SuperGLUE)?"""

from mezo.data.hub import from_hub, labelled
from mezo.data.task import Prompt, Task

# the hub's labels: entailment, contradiction, neutral
CB = Task(
    "cb",
    from_hub("aps/super_glue", "cb"),
    prompt=Prompt(
        'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
        ("Yes", "No", "Maybe"),
        text_field="premise",
    ),
    row=labelled(),
)
