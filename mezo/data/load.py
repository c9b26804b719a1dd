"""From a task's stored rows to tokenised examples: checked, sampled, put into the prompt and encoded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from transformers import PreTrainedTokenizerBase

from mezo.config import Data, Method
from mezo.data.checking import items_of
from mezo.data.demonstrations import draw_demonstrations, put_before
from mezo.data.example import Example
from mezo.data.sampling import sample
from mezo.data.task import Item, Prompt, Task
from mezo.data.template import Template
from mezo.data.tokenization import encode
from mezo.errors import UserError


class Splits(dict[str, list[Example]]):
    """Examples by split; `skipped` has how many bad rows were left out of each, where there were any.

    `decode` gives the text of token ids, None where there is no tokenizer.
    """

    skipped: Mapping[str, int] = MappingProxyType({})
    decode: Callable[[Sequence[int]], str] | None = None


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
    """
    if masked is None:
        masked = tokenizer.mask_token is not None
    masked = masked and not pooled
    prompt = _prompt(task, data, masked)
    template = Template.parse(prompt.template, prompt.text_field)
    right_alone = not any(name in method.objectives for name in ("cross_entropy", "accuracy"))
    # a reward alone asks for no right answer
    min_options = 0 if not method.scores and not _needs_references(method) else 1 if right_alone else 2
    checked = {
        split: items_of(task, split, rows, template.fields, prompt.label_words, min_options, data.skip_bad_rows)
        for split, rows in task.load().items()
    }
    items = {split: own for split, (own, _) in checked.items()}
    kept = sample(items, data, task.dev_size)
    if data.num_demonstrations:
        if "train" not in kept or len(kept) == 1:
            missing = "test" if "train" in kept else "train"
            raise UserError(f"--num-demonstrations needs train and what is tested: give --{missing}-file")
        drawn = draw_demonstrations(kept.pop("train"), data)
        kept = {
            split: put_before(items, drawn, template, tokenizer, data.max_length, masked)
            for split, items in kept.items()
        }
    if "train" in kept and not (right_alone and method.eval_train):
        kept["train"] = [_right_alone(r) if right_alone else _one_right(r) for r in kept["train"]]
    judged, length = {split: _as_judged(items, method) for split, items in kept.items()}, data.max_length
    splits = Splits(
        {split: encode(items, template, tokenizer, length, masked, pooled) for split, items in judged.items()}
    )
    splits.decode = tokenizer.decode
    splits.skipped = {split: skipped for split, (_, skipped) in checked.items() if skipped}
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


def _as_judged(items: list[Item], method: Method) -> list[Item]:
    """Without what nobody reads: an example, and the hash of the data, hold what the run depends on."""
    kept = items
    if not _needs_references(method):
        kept = [replace(item, references=item.references if item.names else ()) for item in kept]
    return kept if "reward" in method.objectives else [replace(item, row={}) for item in kept]
