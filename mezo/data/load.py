"""From a task's stored rows to tokenised examples: checked, sampled, put into the prompt and encoded."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedTokenizerBase

from mezo.config import Data, Method
from mezo.data.checking import all_of, items_of, items_of_row, say_skipped
from mezo.data.columns import KINDS, OF_TRL
from mezo.data.demonstrations import draw_demonstrations, put_before
from mezo.data.example import Example
from mezo.data.files import LARGE, without_empty
from mezo.data.further import Further
from mezo.data.large import LargeExamples, looked_at
from mezo.data.own import OwnData, is_of_trl
from mezo.data.sampling import sample_indices
from mezo.data.task import Item, Prompt, Row, Task
from mezo.data.template import Template
from mezo.data.tokenization import encode
from mezo.data.trl import expander
from mezo.errors import UserError
from mezo.progress import say

if TYPE_CHECKING:
    from mezo.data.by_columns import Columns

MOST_BAD = 10_000  # bad rows of a large data set that are counted before it is refused


class Splits(dict[str, Sequence[Example]]):
    """Examples by split; `skipped` has how many bad rows were left out of each, where there were any.

    `decode` gives the text of token ids, None where there is no tokenizer. `further` makes training examples of what
    comes later; None where the training set is read as it is drawn.
    """

    skipped: Mapping[str, int] = MappingProxyType({})
    decode: Callable[[Sequence[int]], str] | None = None
    further: Further | None = None


def examples_of(
    task: Task,
    data: Data,
    method: Method,
    tokenizer: PreTrainedTokenizerBase,
    masked: bool | None = None,
    pooled: bool = False,
) -> Splits:
    """The tokenised examples of a task: a pure function of its rows, the configuration and the tokenizer.

    Args:
        task: where the rows come from, and what a model is asked about each.
        data: the prompt, the options, how many examples and the token budget.
        method: its objectives, which are not "auto", say what of an example is read.
        tokenizer: the model's.
        masked: whether the model fills masks; None: it does if its tokenizer has a mask token.
        pooled: a linear head scores the mean of the hidden states; the options are classes, not words.

    Returns:
        Examples by split: "train", and "dev" and "test" where there are any. Under lm_cross_entropy a training example
        has its right option alone, which is all that the loss reads, unless the run also scores train (eval_train).
        With num_demonstrations train is what these are drawn from, and is left out.

    Raises:
        UserError: bad data or a configuration that does not fit it; nothing has been written.

    A training set of more than `LARGE` rows is tokenised as it is drawn, see `LargeExamples`.
    """
    if masked is None:
        masked = tokenizer.mask_token is not None
    masked = masked and not pooled
    form = _form(task, masked or pooled)
    prompt = _prompt(task, data, masked)
    template = Template.parse(prompt.template, prompt.text_field)
    right_alone = not any(name in method.objectives for name in ("cross_entropy", "accuracy"))
    # a reward alone asks for no right answer
    min_options = 0 if not method.scores and not _needs_references(method) else 1 if right_alone else 2
    read = _reader(task, data, tokenizer)
    min_options = 0 if form == "text" else min_options
    checking = (template.fields, prompt.label_words, min_options)

    def examples(items: Sequence[Item], train: bool = True) -> list[Example]:
        """Tokenised examples of items."""
        if train and not (right_alone and method.eval_train):
            items = [_right_alone(r) if right_alone else _one_right(r) for r in items]
        judged = _as_judged(items, method)
        return encode(judged, template, tokenizer, data.max_length, masked, pooled, form, data.truncation)

    rows, skipped, large = task.load(), {}, None
    if _is_large(task, data, method):
        from mezo.data.by_columns import Columns, LightItems, hashed, tokenizer_hash  # pyarrow, which few need

        large = Columns(rows["train"], task.reading, template.fields, prompt.label_words)
        usable, skipped["train"] = _usable(task, large, data.skip_bad_rows, *checking, read)
        places = large.places(usable)
    items: dict[str, Sequence[Item]] = {}
    for split, stored in rows.items():
        if large and split == "train":
            items[split] = LightItems(large.labels[places[0]], prompt.label_words)
        else:
            items[split], skipped[split] = items_of(task, split, stored, *checking, data.skip_bad_rows, read)
    _say_reading(task, {split: len(each) for split, each in items.items()})
    numbers = sample_indices(items, data, task.dev_size)
    kept = {split: items[split if split in items else "train"] for split in numbers}
    held = {split: [kept[split][i] for i in numbers[split]] for split in kept if not (large and split == "train")}
    if large:

        def items_at(row: int) -> list[Item]:
            where = f"{task.sources['train']} {task.counted['train']} {row + 1}"
            return items_of_row(task, rows["train"].row(row), where, *checking, read)

        chosen = numbers["train"]
        at = places if isinstance(chosen, range) else (places[0][chosen], places[1][chosen])  # a range is all of them
        if len(chosen) <= LARGE:
            held = {"train": [items_at(int(row))[turn] for row, turn in zip(*at, strict=True)], **held}
    if data.num_demonstrations:
        if "train" not in held or len(held) == 1:
            missing = "test" if "train" in held else "train"
            raise UserError(f"--num-demonstrations needs train and what is tested: give --{missing}-file")
        drawn = draw_demonstrations(held.pop("train"), data)
        held = {
            split: put_before(items, drawn, template, tokenizer, data.max_length, masked)
            for split, items in held.items()
        }
    splits = Splits({split: examples(items, split == "train") for split, items in held.items()})
    if large and len(chosen) > LARGE:

        def make(at: Sequence[int]) -> list[list[Example]]:
            """Examples of rows, all of which are tokenised at once."""
            made = [items_at(row) for row in at]
            tokenised = iter(examples([item for each in made for item in each]))
            return [[next(tokenised) for _ in each] for each in made]

        decides = {
            "kind": task.reading.kind, "template": template.text, "cut": template.cut, "words": prompt.label_words,
            "form": form, "truncation": data.truncation, "max_length": data.max_length, "masked": masked,
            "pooled": pooled, "right_alone": right_alone, "min_options": min_options,
            "references": _needs_references(method), "chat_template": data.chat_template or tokenizer.chat_template,
            "tokenizer": tokenizer_hash(tokenizer),
        }  # fmt: skip
        identity = large.hash(large.among(at[0]), {**decides, "turns": hashed(at[1])})
        alike = task.reading.kind == "labelled"
        train = LargeExamples(at, large.labels[at[0]], make, identity, alike, data.max_length)
        splits = Splits({"train": train, **splits})
        looked_at(train)  # what is wrong with one of these is found before anything is written
    elif "train" in splits:

        def of_row(row: Row, where: str) -> list[Example]:
            return examples(items_of_row(task, without_empty(row), where, *checking, read))

        def of_answer(item: Item) -> Example:
            whole, kind = Template.parse("{prompt}", "prompt"), form if prompt.label_words else "completion"
            item = _right_alone(item) if right_alone else _one_right(item)
            judged = _as_judged([item], method)
            return encode(judged, whole, tokenizer, data.max_length, False, False, kind, data.truncation)[0]

        kind = task.reading.kind if isinstance(task, OwnData) else "labelled" if prompt.label_words else "options"
        rewarded = "reward" in method.objectives
        splits.further = Further(of_row, of_answer, prompt.label_words, "reward" if rewarded else kind, data.max_length)
    splits.decode = tokenizer.decode
    splits.skipped = {split: count for split, count in skipped.items() if count}
    return splits


def _prompt(task: Task, data: Data, masked: bool) -> Prompt:
    """The task's prompt for the kind of model at hand, as far as the configuration does not replace it."""
    own, other = (task.masked, task.prompt) if masked else (task.prompt, task.masked)
    if own is None and not data.prompt:
        what = "fills a mask" if masked else "continues text"
        raise UserError(f"task {task.name} has no prompt for a model that {what}: give --prompt")
    given = own or other or Prompt(data.prompt)
    words = data.label_words or given.label_words
    if given.label_words and len(words) != len(given.label_words):
        count = len(given.label_words)
        raise UserError(f"--label-words has {len(words)} words, task {task.name} has {count} classes")
    return Prompt(data.prompt or given.template, words, given.text_field)


def _is_large(task: Task, data: Data, method: Method) -> bool:
    """Whether the training set is too large to be read row by row; then it is read by columns.

    Not one whose rows have options of their own, or are read by a reward, and not the examples of --task.
    """
    if not isinstance(task, OwnData) or "train" not in task.stored or data.num_demonstrations:
        return False
    kind, rows = task.reading.kind, task.stored["train"].rows
    return (
        (kind in OF_TRL or kind == "labelled")
        and "reward" not in method.objectives
        and len(rows) > LARGE
        and not isinstance(rows, list)
    )


def _usable(
    task: OwnData,
    columns: "Columns",
    skip_bad: bool,
    template_fields: Sequence[str],
    label_words: Sequence[str],
    min_options: int,
    read: Callable[[Row, str], Iterable[Row]] | None,
) -> tuple[np.ndarray, int]:
    """Numbers of the rows of a large training set that can be used, and how many cannot. See `items_of`."""
    stored, bad = task.stored["train"], []
    for row in np.flatnonzero(~columns.usable).tolist():
        where = f"{stored.source} {stored.unit} {row + 1}"
        try:
            items_of_row(task, without_empty(stored.rows[row]), where, template_fields, label_words, min_options, read)
            bad.append(UserError(f"{where} cannot be used: a column that is read has no value, or no known label"))
        except UserError as error:
            bad.append(error)
        if len(bad) == MOST_BAD and not skip_bad:
            break
    usable = np.flatnonzero(columns.usable)
    if bad and not (skip_bad and len(usable)):
        raise all_of(bad, stored.source, len(stored.rows))
    if bad:
        say_skipped(bad, stored.source, len(stored.rows))
    return usable, len(bad)


def _form(task: Task, alone: bool) -> str:
    """How examples are tokenised, see `encode`. `alone`: the model does not continue text."""
    if not is_of_trl(task):
        return "options"
    reading = task.reading
    if alone:
        raise UserError(
            f"{next(iter(task.sources.values()))} has {KINDS[reading.kind]}, which needs a model that continues text:"
            " give --label-words, or another model"
        )
    return "text" if reading.kind == "text" else "chat" if reading.conversational else "completion"


def _reader(task: Task, data: Data, tokenizer: PreTrainedTokenizerBase) -> Callable[[Row, str], Iterable[Row]] | None:
    """What makes rows with the fields of the prompt of the rows of a user's own data."""
    if not isinstance(task, OwnData):
        return None
    if task.reading.kind in ("completion", "preference", "messages"):
        return expander(task.reading, data, tokenizer)
    return None if task.reading.plain else lambda row, where: (task.reading.row(row, where),)


def _say_reading(task: Task, examples: Mapping[str, int]) -> None:
    """What of a user's data was taken for what, unless its names leave no doubt."""
    if isinstance(task, OwnData) and not task.reading.plain:
        first = next(iter(task.sources.values()))
        counted = ", ".join(f"{count:,} of {split}" for split, count in examples.items())
        say(f"{first}: {task.reading}; examples: {counted}")


def _right_alone(item: Item) -> Item:
    """Without the wrong options; one without options has nothing to lose."""
    options, names = item.options[item.label :][:1], item.names[item.label :][:1]
    return replace(item, options=options, names=names, label=0)


def _one_right(item: Item) -> Item:
    """Of several right options, the labelled one alone: a loss over the options has one right."""
    twins = {i for i, name in enumerate(item.names) if name in item.references and i != item.label}
    if not twins:
        return item
    kept = [i for i in range(len(item.options)) if i not in twins]
    options, names = (tuple(values[i] for i in kept) for values in (item.options, item.names))
    return replace(item, options=options, names=names, label=kept.index(item.label))


def _needs_references(method: Method) -> bool:
    return method.generate == "on" or "f1" in method.objectives


def _as_judged(items: Sequence[Item], method: Method) -> list[Item]:
    """Without what nobody reads: an example, and the hash of the data, hold what the run depends on."""
    kept = items
    if not _needs_references(method):
        kept = [replace(item, references=item.references if item.names else ()) for item in kept]
    return kept if "reward" in method.objectives else [replace(item, row={}) for item in kept]
