"""WiC: does a word mean the same in two sentences (Pilehvar and Camacho-Collados 2019; SuperGLUE)?"""

from mezo.data.hub import from_hub, labelled
from mezo.data.task import Prompt, Task

WIC = Task(
    "wic",
    from_hub("aps/super_glue", "wic"),
    prompt=Prompt(
        'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n',
        ("No", "Yes"),
        text_field=None,  # either sentence may end in the word that is asked about
    ),
    row=labelled(),
)
