"""Items to token ids: each option is tokenised together with its prompt, and only the text is cut to the budget."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from mezo.data.example import Example
from mezo.data.large import LargeExamples, looked_at
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
    form: str = "options",
    truncation: str = "right",
) -> list[Example]:
    """Tokenise items: option ids = tokens(prompt + option) without their prefix tokens(prompt).

    Args:
        items: what to tokenise.
        template: the prompt around each item's fields.
        tokenizer: adds its special tokens; those it would append after the prompt are left out before an option.
        max_length: most tokens of a prompt with its longest option; an end of the field `template.cut` gives way.
        masked: the model fills a mask: options are single tokens in its place.
        pooled: a head for classes reads the whole text: options are numbers of its outputs.
        form: "options"; "completion", options that begin wherever their tokens differ from the prompt's and end with
            the end-of-text token; "chat", the same of a text that a chat template wrote with its special tokens;
            "text", the prompt itself is what is scored, from its second token on.
        truncation: which end gives way, "right" or "left"; "refuse": none does.

    Returns:
        One example per item, in order.

    Raises:
        UserError: the template alone exceeds the budget, a token would span prompt and option, two options have the
            same tokens, or the mask is missing or has no single-token option.
    """
    if form in _SPLITTERS:
        split = _SPLITTERS[form](template, tokenizer)
    else:
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
            truncation,
        )
        # Joined anew, the shortened text may take a token more than counted: cut until it fits.
        for i, item, example in zip(over, shorter, split(shorter), strict=True):
            items[i], examples[i] = item, example
    for item, example in zip(items, examples, strict=True):
        _check(item, example, tokenizer, _length(example, alone), words=form == "options")
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
    for examples in splits.values():
        if isinstance(examples, LargeExamples):
            examples.checks.append(lambda made: _refuse_unknown(made, vocabulary, tokenizer))
        _refuse_unknown(looked_at(examples), vocabulary, tokenizer)


def _refuse_unknown(examples: Sequence[Example], vocabulary: int, tokenizer: PreTrainedTokenizerBase) -> None:
    for example in examples:
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


class _CompletionSplitter(_CausalSplitter):
    """Prompt and completions: joined, tokens are as the model sees them, one across the border is the completion's."""

    special = True

    def __init__(self, template: Template, tokenizer: PreTrainedTokenizerBase):
        super().__init__(template, tokenizer)
        self.suffix = self.suffix if self.special else 0
        self.end = (tokenizer.eos_token_id,) if self.special and tokenizer.eos_token_id is not None else ()

    def __call__(self, items: Sequence[Item]) -> list[Example]:
        prompts = [item.before + self.template.render(item.fields) for item in items]
        joint = iter(self._ids([p + option for p, r in zip(prompts, items, strict=True) for option in r.options]))
        examples = []
        for item, prompt in zip(items, self._ids(prompts), strict=True):
            whole = [next(joint) for _ in item.options]
            n = min(_common(prompt, ids) for ids in whole)
            if not n:
                raise UserError(f"{item.where}: the prompt is empty: add words to it, or give texts alone")
            options = tuple(ids[n:] + (() if ids[-1:] == self.end else self.end) for ids in whole)
            examples.append(Example(prompt[:n], options, item.label, **_judged(item)))
        return examples

    def _ids(self, texts: list[str]) -> list[Ids]:
        batch = _token_ids(self.tokenizer, texts, self.special) if texts else []
        return [tuple(ids[: len(ids) - self.suffix]) for ids in batch]


class _ChatSplitter(_CompletionSplitter):
    """The same of conversations: the chat template writes every special token, that which ends a turn too."""

    special = False


class _TextSplitter(_CausalSplitter):
    """Text alone: all tokens but the first are what is scored, and the end-of-text token."""

    def __call__(self, items: Sequence[Item]) -> list[Example]:
        eos = self.tokenizer.eos_token_id
        end, examples = () if eos is None else (eos,), []
        for item, ids in zip(items, self._ids([self.template.render(item.fields) for item in items]), strict=True):
            whole = ids + (() if ids[-1:] == end else end)
            if len(whole) < 2:
                raise UserError(f"{item.where}: the text has fewer than two tokens, none to learn: remove the row")
            examples.append(Example(whole[:1], (whole[1:],), 0, **_judged(item)))
        return examples


_SPLITTERS = {"completion": _CompletionSplitter, "chat": _ChatSplitter, "text": _TextSplitter}


def _common(a: Ids, b: Ids) -> int:
    """Tokens that two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


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
    """Text as an encoder sees it, with its special tokens; the options are the numbers of a head's outputs."""

    def __init__(self, template: Template, tokenizer: PreTrainedTokenizerBase):
        if template.has_mask:
            raise UserError(f"--prompt {template.text!r} has {MASK}, but a head for classes reads no mask: drop it")
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


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool = True) -> list[list[int]]:
    # Without the attention mask, which nobody reads, the call takes a third of the time.
    return tokenizer(texts, return_attention_mask=False, verbose=False, add_special_tokens=special)["input_ids"]


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
    truncation: str,
) -> list[Item]:
    """The items with their text cut where that leaves room for template and options."""
    too_long = f"{items[0].where} takes {lengths[0]} tokens, --max-length is {max_length}"
    if truncation == "refuse":
        raise UserError(f"{too_long}, and --truncation refuse cuts none: raise it, or shorten the text")
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
        text = item.fields[template.cut]
        if truncation == "left":
            text = text[max(inside[-keep] - start, 0) :].lstrip()
        else:
            text = text[: max(inside[keep] - start, 0)].rstrip()
        cut.append(replace(item, fields={**item.fields, template.cut: text}))
    return cut


def _check(item: Item, example: Example, tokenizer: PreTrainedTokenizerBase, length: int, words: bool) -> None:
    """Raise UserError for options that cannot be told apart or have no tokens, and for what the model cannot take.

    `words`: options are words, which the tokenizer must know.
    """
    options = [] if example.pooled else zip(item.options, example.options, strict=words)
    for option, ids in options:
        if not ids or (words and tokenizer.unk_token_id in ids):
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
