"""SQuAD: questions whose answer is a span of a passage (Rajpurkar et al. 2016); the first is trained on."""

from mezo.data.hub import from_hub
from mezo.data.task import Prompt, Row, Task


def answered(row: Row) -> Row | None:
    """The first answer as the only option, with the line break that ends it; None: there is none.

    >>> row = {"title": "Ice", "context": "Ice is cold.", "question": " What is cold?", "id": "1"}
    >>> answered({**row, "answers": {"text": ["Ice", "ice"], "answer_start": [0, 0]}})["options"]
    [' Ice\\n']
    """
    references = [text.strip() for text in row["answers"]["text"] if text.strip()]
    if not references:
        return None
    options = [f" {references[0]}\n"]
    return {**row, "question": row["question"].strip(), "options": options, "answer": 0, "references": references}


SQUAD = Task(
    "squad",
    from_hub("rajpurkar/squad"),
    prompt=Prompt("Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:", text_field="context"),
    row=answered,
    objective="lm_cross_entropy",
    metric="f1",
    generate=True,
)
