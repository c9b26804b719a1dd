"""MultiRC: is an answer to a question about a paragraph right (Khashabi et al. 2018; SuperGLUE)?"""

from mezo.tasks.base import Prompt, Task
from mezo.tasks.hub import from_hub, labelled

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
