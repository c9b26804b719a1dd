"""Items to token ids: each option is tokenised together with its prompt, and only the text is cut to the budget."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from mezo.data.example import Example
from mezo.data.task import Item
from mezo.data.template import MASK, Template
from mezo.errors import UserError

Ids = tuple[int, ...]


def encode(
    items: Sequence[Item],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    masked: bool = False,
    pooled: bool = False,
) -> list[Example]:
    """Tokenise items: option ids = tokens(prompt + option) without their prefix tokens(prompt).

    Args:
        items: what to tokenise.
        template: the prompt around each item's fields.
        tokenizer: adds its special tokens; those it would append after the prompt are left out before an option.
        max_length: most tokens of a prompt with its longest option; the end of the field `template.cut` gives way.
        masked: the model fills a mask: options are single tokens in its place.
        pooled: a linear head reads the whole text: options are numbers of its outputs.

    Returns:
        One example per item, in order.

    Raises:
        UserError: the template alone exceeds the budget, a token would span prompt and option, two options have the
            same tokens, or the mask is missing or has no single-token option.
    """
    split = _PooledSplitter(template, tokenizer) if pooled else _splitter(template, tokenizer, masked)
    alone = masked or pooled  # no option follows the prompt
    items = list(items)
    examples = split(items)
    while over := [i for i, example in enumerate(examples) if _length(example, alone) > max_length]:
        shorter = _cut(
            [items[i] for i in over],
            [_length(examples[i], alone) for i in over],
            max_length,
            split.template,
            tokenizer,
        )
        # Joined anew, the shortened text may take a token more than counted: cut until it fits.
        for i, item, example in zip(over, shorter, split(shorter), strict=True):
            items[i], examples[i] = item, example
    for item, example in zip(items, examples, strict=True):
        _check(item, example, tokenizer, _length(example, alone))
    return examples


def refuse_unknown_ids(
    splits: Mapping[str, Sequence[Example]], vocabulary: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise UserError for the first token that a model has no embedding of.

    Args:
        splits: tokenised examples.
        vocabulary: rows of the model's embedding.
        tokenizer: that made them; it may know more tokens than the model.
    """
    for example in (example for examples in splits.values() for example in examples):
        outputs = [] if example.pooled else example.options
        largest = max((*example.prompt, *(token for option in outputs for token in option)))
        if largest >= vocabulary:
            token = tokenizer.convert_ids_to_tokens(largest)
            raise UserError(
                f"{example.where}: token {token!r} has the number {largest}, the model has embeddings for {vocabulary}:"
                " its tokenizer is of another model; use the model's own, or remove the token"
            )


def oddities(splits: Mapping[str, Sequence[Example]], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """What is allowed and seldom meant: a sentence each.

    Args:
        splits: tokenised examples.
        tokenizer: that made them.
    """
    train, bos = splits.get("train", ()), tokenizer.bos_token_id
    labels = {example.label for example in train if len(example.options) > 1}
    if len(train) > 1 and len(labels) == 1 and all(example.options == train[0].options for example in train):
        yield f"every training example has the label {labels.pop()}: there is nothing to tell apart"
    control = set(tokenizer.all_special_ids) - {tokenizer.mask_token_id, tokenizer.unk_token_id}
    for split, examples in splits.items():
        twice = [e for e in examples if bos is not None and e.prompt[:2] == (bos, bos)]
        if twice:
            where = f"{len(twice)} of {len(examples)} prompts of {split}, such as {twice[0].where},"
            yield f"{where} begin with {tokenizer.bos_token} twice: the tokenizer adds it, leave it out of --prompt"
        for token in sorted(control):
            counts = [e.prompt.count(token) for e in examples]  # those of the template are in every prompt
            more = [e for e, n in zip(examples, counts, strict=True) if n > min(counts)]
            if more:
                where = f"{len(more)} of {len(examples)} texts of {split}, such as {more[0].where},"
                yield f"{where} contain {tokenizer.convert_ids_to_tokens(token)}, a control token of the model"


def prompt_lengths(
    items: Sequence[Item], template: Template, tokenizer: PreTrainedTokenizerBase, masked: bool
) -> list[int]:
    """Tokens that each item's whole prompt takes with its longest option.

    Args:
        items: whose prompts are measured.
        template: the prompt around each item's fields.
        tokenizer: the model's.
        masked: the model fills a mask, and an option takes no room of its own.
    """
    return [_length(example, masked) for example in _splitter(template, tokenizer, masked)(list(items))]


def _splitter(template: Template, tokenizer: PreTrainedTokenizerBase, masked: bool):
    return _MaskedSplitter(template, tokenizer) if masked else _CausalSplitter(template, tokenizer)


class _CausalSplitter:
    """Prompt and options as a decoder sees them: the option follows the prompt."""

    def __init__(self, template: Template, tokenizer: PreTrainedTokenizerBase):
        if template.has_mask:
            raise UserError(f"--prompt {template.text!r} has {MASK}, but the model fills no masks: drop it")
        self.template, self.tokenizer = template, tokenizer
        self.suffix = _suffix_length(tokenizer)

    def __call__(self, items: Sequence[Item]) -> list[Example]:
        prompts = [item.before + self.template.render(item.fields) for item in items]
        answered = [prompt + option for prompt, r in zip(prompts, items, strict=True) for option in r.options]
        joint = iter(self._ids(answered))
        examples = []
        for item, text, prompt in zip(items, prompts, self._ids(prompts), strict=True):
            if not prompt:
                raise UserError(f"{item.where}: the prompt is empty: add words to --prompt")
            options = tuple(_rest(prompt, next(joint), text, option, item.where) for option in item.options)
            examples.append(Example(prompt, options, item.label, **_judged(item)))
        return examples

    def _ids(self, texts: list[str]) -> list[Ids]:
        batch = _token_ids(self.tokenizer, texts) if texts else []
        return [tuple(ids[: len(ids) - self.suffix]) for ids in batch]


class _MaskedSplitter:
    """Prompt and options as an encoder sees them: the option stands in the mask's place."""

    def __init__(self, template: Template, tokenizer: PreTrainedTokenizerBase):
        if tokenizer.mask_token is None:
            raise UserError("the tokenizer has no mask token: use a masked language model or drop <mask>")
        self.mask_id = tokenizer.mask_token_id
        self.template, self.tokenizer = template.with_mask(tokenizer.mask_token), tokenizer
        if tokenizer.mask_token not in self.template.render(dict.fromkeys(template.fields, "")):
            raise UserError(
                f"--prompt {template.text!r} has no {MASK}, and the model fills masks:"
                f" add it, as in '{{text}} It was{MASK}.'"
            )
        self.words: dict[str, int] = {}

    def __call__(self, items: Sequence[Item]) -> list[Example]:
        prompts = [item.before + self.template.render(item.fields) for item in items]
        examples = []
        for item, ids in zip(items, _token_ids(self.tokenizer, prompts), strict=True):
            masks = ids.count(self.mask_id)
            if masks != 1:
                raise UserError(f"{item.where}: the prompt must have one mask, got {masks}: remove it from the text")
            options = tuple((self._word(option),) for option in item.options)
            mask = ids.index(self.mask_id)
            examples.append(Example(tuple(ids), options, item.label, mask, **_judged(item)))
        return examples

    def _word(self, option: str) -> int:
        if option not in self.words:
            ids = self.tokenizer(option, add_special_tokens=False)["input_ids"]
            if len(ids) != 1:
                raise UserError(
                    f"label word {option!r} must be one token to fill a mask, got {len(ids)}:"
                    " give it a leading space or choose a more common word"
                )
            self.words[option] = ids[0]
        return self.words[option]


class _PooledSplitter:
    """Text as an encoder sees it, with its special tokens; the options are the numbers of a linear head's outputs."""

    def __init__(self, template: Template, tokenizer: PreTrainedTokenizerBase):
        if template.has_mask:
            raise UserError(f"--prompt {template.text!r} has {MASK}, but a linear head reads no mask: drop it")
        self.template, self.tokenizer = template, tokenizer

    def __call__(self, items: Sequence[Item]) -> list[Example]:
        ids = _token_ids(self.tokenizer, [self.template.render(item.fields) for item in items])
        empty = next((item.where for item, tokens in zip(items, ids, strict=True) if not tokens), None)
        if empty:
            raise UserError(f"{empty}: the text has no token: add words to --prompt or remove the line")
        examples = []
        for item, tokens in zip(items, ids, strict=True):
            outputs = tuple((i,) for i in range(len(item.options)))
            examples.append(Example(tuple(tokens), outputs, item.label, pooled=True, **_judged(item)))
        return examples


def _judged(item: Item) -> dict:
    """Fields of an example that judge answers as text."""
    return {"references": item.references, "names": item.names, "fields": item.row, "where": item.where}


def _length(example: Example, alone: bool) -> int:
    return len(example.prompt) + (0 if alone else max(map(len, example.options), default=0))


def _rest(prompt: Ids, joint: Ids, text: str, option: str, where: str) -> Ids:
    if joint[: len(prompt)] != prompt:
        raise UserError(
            f"{where}: a token spans the prompt's end {text[-12:]!r} and the option {option[:12]!r}:"
            " start the option with a space and end the prompt without one"
        )
    return joint[len(prompt) :]


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # Without the attention mask, which nobody reads, the call takes a third of the time.
    return tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]


def _suffix_length(tokenizer: PreTrainedTokenizerBase) -> int:
    """Special tokens the tokenizer appends: between a prompt and its option they would end the text."""
    bare, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return len(full) - start - len(bare)


def _cut(
    items: Sequence[Item],
    lengths: Sequence[int],
    max_length: int,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Item]:
    """The items with their text cut after the last token that leaves room for template and options."""
    too_long = f"{items[0].where} takes {lengths[0]} tokens, --max-length is {max_length}"
    if template.cut is None:
        raise UserError(f"{too_long}, and only {{text}} is cut: raise --max-length or shorten the prompt")
    if not tokenizer.is_fast:
        raise UserError(f"{too_long}, and a slow tokenizer cannot cut: raise --max-length or shorten the prompt")
    prompts = [template.render(item.fields) for item in items]
    offsets = tokenizer(prompts, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
    cut = []
    for item, length, spans in zip(items, lengths, offsets["offset_mapping"], strict=True):
        start, end = template.cut_span(item.fields)
        # Special tokens have the empty span (0, 0).
        inside = [first for first, last in spans if first < end and last > start and last > first]
        keep = len(inside) - (length - max_length)
        if keep <= 0:
            raise UserError(
                f"{item.where}: without its text the prompt takes {length - len(inside)} tokens,"
                f" --max-length is {max_length}: raise it or shorten the prompt"
            )
        text = item.fields[template.cut][: max(inside[keep] - start, 0)].rstrip()
        cut.append(replace(item, fields={**item.fields, template.cut: text}))
    return cut


def _check(item: Item, example: Example, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
    words = [] if example.pooled else zip(item.options, example.options, strict=True)
    for option, ids in words:
        if not ids or tokenizer.unk_token_id in ids:
            what = "an unknown token" if ids else "no token"
            raise UserError(f"{item.where}: option {option!r} has {what}: choose a word the tokenizer knows")
    if len(set(example.options)) < len(example.options):
        first = next(i for i, ids in enumerate(example.options) if ids in example.options[:i])
        twin = example.options.index(example.options[first])
        raise UserError(
            f"{item.where}: options {item.options[twin]!r} and {item.options[first]!r} are the same tokens"
            f" {list(example.options[first])}: change one"
        )
    if length > tokenizer.model_max_length:
        raise UserError(
            f"{item.where} takes {length} tokens, the model {tokenizer.model_max_length}:"
            f" set --max-length {tokenizer.model_max_length}"
        )
