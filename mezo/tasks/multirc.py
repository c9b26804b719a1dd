"""MultiRC: is an answer to a question about a paragraph right (Khashabi et al. 2018; SuperGLUE)?"""

from mezo.data.hub import from_hub, labelled
from mezo.data.task import Prompt, Task

MULTIRC = Task(
    "multirc",
    from_hub("aps/super_glue", "multirc"),
    prompt=Prompt(
        '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n',
        ("No", "Yes"),
        text_field="paragraph",
    ),
    row=labelled(),
)
