"""In-context learning: training examples with their right answers in front of a tested prompt (Brown et al. 2020)."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from mezo.config import Data
from mezo.data.sampling import class_pool, take_balanced
from mezo.data.task import Item
from mezo.data.template import Template
from mezo.data.tokenization import prompt_lengths
from mezo.errors import UserError

SEPARATOR = "\n\n"
log = logging.getLogger(__name__)


def draw_demonstrations(train: Sequence[Item], data: Data) -> list[Item]:
    """`num_demonstrations` items, balanced over classes where there are classes, in a shuffled order.

    A pure function of (data_seed, train).

    Raises:
        UserError: more asked for than there are.
    """
    number = data.num_demonstrations
    if number > len(train):
        raise UserError(f"--num-demonstrations is {number}, but train has {len(train)} examples: lower it")
    pool = class_pool(train, data.data_seed, "demonstrations")
    order = {i: hashlib.sha256(f"{data.data_seed}/order/{i}".encode()).digest() for i in range(len(train))}
    return [train[i] for i in sorted(take_balanced(pool, number), key=order.__getitem__)]


def demonstration(item: Item, template: Template) -> str:
    """An item with its right answer, as it stands in front of a prompt: in the mask's place, or after the prompt.

    >>> item = Item({"text": "Fun."}, (" bad", " good"), 1, "")
    >>> demonstration(item, Template.parse("{text} It was<mask>.", "text"))
    'Fun. It was good.\\n\\n'
    >>> demonstration(item, Template.parse("{text} It was", "text"))
    'Fun. It was good\\n\\n'
    """
    answer = item.options[item.label]
    text = template.render(item.fields, answer) if template.has_mask else template.render(item.fields) + answer
    return text.strip() + SEPARATOR


def put_before(
    items: Sequence[Item],
    demonstrations: Sequence[Item],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    masked: bool,
) -> list[Item]:
    """The items with the demonstrations in front that fit the token budget; no item's own text is cut for one.

    Args:
        items: those that are tested.
        demonstrations: in order; one that does not fit is left out, and said so.
        template: the prompt of both.
        tokenizer: the model's.
        max_length: most tokens of a prompt with its longest option, demonstrations included.
        masked: the model fills a mask.

    Raises:
        UserError: a demonstration holds the tokenizer's mask token.
    """
    texts = [demonstration(item, template) for item in demonstrations]
    mask = tokenizer.mask_token if masked else None
    for text, item in zip(texts, demonstrations, strict=True):
        if mask and mask in text:
            raise UserError(f"{item.where}: a demonstration must have no mask: remove {mask} from the text")
    sizes = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    chosen = [_fitting(sizes, max_length - length) for length in prompt_lengths(items, template, tokenizer, masked)]
    # Joined, texts may take a token more than counted apart: leave out the last until all fit.
    while True:
        made = [
            replace(item, before="".join(texts[i] for i in numbers))
            for item, numbers in zip(items, chosen, strict=True)
        ]
        lengths = prompt_lengths(made, template, tokenizer, masked)
        over = [i for i, length in enumerate(lengths) if length > max_length and chosen[i]]
        if not over:
            break
        for i in over:
            chosen[i].pop()
    _say_what_is_missing([len(numbers) for numbers in chosen], len(texts), max_length, items[0].where)
    return made


def _fitting(sizes: Sequence[int], room: int) -> list[int]:
    """Indices of the sizes that fit a room together, taken in order.

    >>> _fitting([3, 9, 2], 6)
    [0, 2]
    """
    fitting = []
    for i, size in enumerate(sizes):
        if size <= room:
            fitting.append(i)
            room -= size
    return fitting


def _say_what_is_missing(numbers: Sequence[int], asked: int, max_length: int, first: str) -> None:
    short = [number for number in numbers if number < asked]
    if short:
        log.warning(
            "%s: %d of %d prompts have room for fewer than %d demonstrations (the least: %d) at --max-length %d;"
            " raise it or ask for fewer",
            first.rpartition(" line ")[0],
            len(short),
            len(numbers),
            asked,
            min(short),
            max_length,
        )
