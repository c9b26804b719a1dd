"""WSC: does a pronoun refer to a given phrase (Levesque et al. 2012; SuperGLUE)?"""

from mezo.data.hub import from_hub, labelled
from mezo.data.task import Prompt, Row, Task


def pronoun_in_lower_case(row: Row) -> Row:
    """`span2_text`, the pronoun, as one quotes it; `span1_text` is the phrase.

    >>> pronoun_in_lower_case({"text": "Mark sat. He slept.", "span2_text": "He", "label": 1})["span2_text"]
    'he'
    """
    return {**row, "span2_text": row["span2_text"].lower()}


WSC = Task(
    "wsc",
    from_hub("aps/super_glue", "wsc.fixed"),
    prompt=Prompt(
        '{text}\nIn the previous sentence, does the pronoun "{span2_text}" refer to {span1_text}? Yes or No?\n',
        ("No", "Yes"),
    ),
    row=labelled(pronoun_in_lower_case),
)
