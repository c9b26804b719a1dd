"""Prompt templates: `{field}` takes a field of the item, `<mask>` becomes the tokenizer's mask token."""

import string
from collections.abc import Mapping
from dataclasses import dataclass

from mezo.errors import UserError

MASK = "<mask>"


@dataclass(frozen=True)
class Template:
    """A prompt around an item's fields.

    Args:
        text: literal text with `{field}` placeholders; `{{` and `}}` are braces, and the two characters `\\n` stand for
            a line break, since a shell's quotes pass them on as they are.
        cut: the field that is shortened to fit a token budget, or None where no field may be.

    >>> Template.parse("{text} It was<mask>.", "text").render({"text": "Fun."}, "[MASK]")
    'Fun. It was[MASK].'
    """

    text: str
    pieces: tuple[tuple[str, str | None], ...]
    cut: str | None

    @classmethod
    def parse(cls, text: str, text_field: str | None) -> "Template":
        """Parse a template; the field that may be cut is `text_field`, or the only one if the template has no other.

        Raises:
            UserError: unbalanced braces, a placeholder that is not a plain field name, or none at all.
        """
        try:
            parsed = list(string.Formatter().parse(text.replace("\\n", "\n")))
        except ValueError as error:
            raise UserError(f"--prompt {text!r} is malformed ({error}): write a literal brace twice") from None
        pieces = []
        for literal, field, spec, conversion in parsed:
            if field is not None and (not field.isidentifier() or spec or conversion):
                raise UserError(
                    f"--prompt {text!r}: a placeholder must be a field name such as {{text}}, got {{{field}}}"
                )
            pieces.append((literal, field))
        names = {field for _, field in pieces if field}
        if not names:
            raise UserError(
                f"--prompt {text!r} takes no field, so every example would be the same: add one, e.g. {{text}}"
            )
        if text_field is not None and text_field not in names:
            text_field = next(iter(names)) if len(names) == 1 else None
        return cls(text, tuple(pieces), text_field)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields the template takes, each once, in order."""
        return tuple(dict.fromkeys(field for _, field in self.pieces if field))

    @property
    def has_mask(self) -> bool:
        """Whether the template asks for a mask token."""
        return any(MASK in literal for literal, _ in self.pieces)

    def with_mask(self, mask_token: str) -> "Template":
        """The same template with `<mask>` replaced; the item's own text is left alone."""
        pieces = tuple((literal.replace(MASK, mask_token), field) for literal, field in self.pieces)
        return Template(self.text, pieces, self.cut)

    def render(self, fields: Mapping[str, str], mask_token: str = MASK) -> str:
        """The prompt of one item."""
        return "".join(
            literal.replace(MASK, mask_token) + (fields[field] if field else "") for literal, field in self.pieces
        )

    def cut_span(self, fields: Mapping[str, str]) -> tuple[int, int]:
        """Characters [start, end) of the rendered prompt that the field that may be cut takes (its first place)."""
        start = 0
        for literal, field in self.pieces:
            start += len(literal)
            if field == self.cut:
                break
            start += len(fields[field]) if field else 0
        return start, start + len(fields[self.cut])
