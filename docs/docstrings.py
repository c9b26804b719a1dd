"""An extension of griffe, which reads docstrings for the reference: their plain text is made Markdown."""

import re

from griffe import Extension

AT_LEAST = re.compile(r": (>=?) ")  # a quotation, to Markdown
EXAMPLE = re.compile(r"^>>> .*?(?=\n\n|\Z)", re.DOTALL | re.MULTILINE)


def markdown(docstring: str) -> str:
    """The text with a fence around each example.

    >>> markdown("lr: >= 0\\n\\n>>> 1\\n1")
    'lr: \\\\>= 0\\n\\n```python\\n>>> 1\\n1\\n```'
    """
    return AT_LEAST.sub(r": \\\1 ", EXAMPLE.sub(lambda example: f"```python\n{example[0]}\n```", docstring))


class Markdown(Extension):
    """See the module."""

    def on_instance(self, *, obj, **_) -> None:
        """Change the docstring of a module, class or function that was read."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
