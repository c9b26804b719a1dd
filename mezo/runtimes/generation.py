"""Generation: the loop of the hf runtime, and what ends a text and becomes of its tokens on every runtime."""

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerBase

from mezo.config import Workload
from mezo.data.example import Example
from mezo.errors import UserError
from mezo.method.sampling import Pick, likeliest
from mezo.models.attention import Prefix, cache_argument
from mezo.models.families import family_of
from mezo.models.load import Checkpoint, load_tokenizer
from mezo.runtimes.rows import Decoder, Row, RowBatch


@dataclass(frozen=True)
class Writing:
    """Generated tokens as text.

    Args:
        tokenizer: the model's.
        ends: token ids that end a text.
    """

    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Writing":
        """As a model says: its tokenizer, and every token that it calls the end of a text."""
        tokenizer = load_tokenizer(checkpoint.name, checkpoint.trusted)
        ends = {tokenizer.eos_token_id}
        sources = [checkpoint.config]
        with contextlib.suppress(OSError):  # not every model has one
            sources.append(GenerationConfig.from_pretrained(checkpoint.name))
        for source in sources:
            tokens = getattr(source, "eos_token_id", None)
            ends |= set(tokens) if isinstance(tokens, list) else {tokens}
        return cls(tokenizer, frozenset(ends - {None}))

    def ended(self, ids: Sequence[int], stop: Sequence[str]) -> bool:
        """Whether a text, which ends before any of `stop`, ends with the last of its tokens."""
        return ids[-1] in self.ends or any(end in self._decoded(ids) for end in stop)

    def text(self, ids: Sequence[int], stop: Sequence[str]) -> str:
        """The text of the tokens up to its end, without white space around it."""
        text = self._decoded(list(itertools.takewhile(lambda token: token not in self.ends, ids)))
        return text[: min((text.find(end) for end in stop if end in text), default=len(text))].strip()

    def _decoded(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def refuse_too_long(
    work: Workload, splits: dict[str, Sequence[Example]], longest: int, limit: int | None, prefix: int = 0
) -> None:
    """Raise UserError if a row, or a prompt with what is generated after it, has no room in the model.

    Args:
        work: what the run asks for.
        splits: examples by split.
        longest: tokens of the longest row that is scored.
        limit: tokens that the model takes, None if any number.
        prefix: tokens of a trained prefix, which the limit leaves out already.
    """
    new = work.max_new_tokens
    prompt = max(len(example.prompt) for examples in splits.values() for example in examples)
    tokens = max(longest, prompt + new)
    if limit is not None and tokens > limit:
        what = f"a prompt with --max-new-tokens {new}" if new else "a prompt"
        after = f" after a prefix of {prefix}" if prefix else ""
        if limit <= new:
            option = "--num-prefix-tokens" if after else "--max-new-tokens"
            raise UserError(
                f"--max-length: {what} has {tokens} tokens, there is room for {limit}{after}; lower {option}"
            )
        raise UserError(
            f"--max-length: {what} has {tokens} tokens, the model takes {limit}{after}; use --max-length {limit - new}"
        )


def decoder_of(checkpoint: Checkpoint) -> Decoder:
    """What an encoder-decoder is given around texts: its tokenizer's special tokens, and the start of its decoder.

    Raises:
        UserError: its configuration has no such start.
    """
    first = checkpoint.config.decoder_start_token_id
    if first is None:
        raise UserError(f"--model {checkpoint.name}: its config.json has no decoder_start_token_id: add it there")
    tokenizer = load_tokenizer(checkpoint.name, checkpoint.trusted)
    bare, full = (tuple(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    at = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return Decoder(end=full[at + len(bare) :], start=(first, *full[:at]))


@torch.no_grad()
def written_by_decoder(
    model: nn.Module,
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ended: Callable[[Sequence[int]], bool],
    pad: int,
    pick: Pick = likeliest,
) -> list[list[int]]:
    """As `written`, of an encoder-decoder: prompts are read once, answers are run anew for each token.

    Args:
        model: with its head.
        decoder: what is given around prompts and answers.
        prompts, max_new_tokens, ended, pad, pick: see `written`.
    """
    rows = RowBatch.of([Row((*prompt, *decoder.end), (0,), ((0,),)) for prompt in prompts], pad, model.device)
    read = model.get_encoder()(input_ids=rows.ids, attention_mask=rows.mask)
    written = torch.tensor([decoder.start] * len(prompts), device=model.device)
    answers, unfinished = [[] for _ in prompts], set(range(len(prompts)))
    for place in range(max_new_tokens):
        out = model(encoder_outputs=read, attention_mask=rows.mask, decoder_input_ids=written, use_cache=False)
        tokens = pick(out.logits[:, -1], place)
        for i in sorted(unfinished):
            answers[i].append(int(tokens[i]))
            unfinished -= {i} if ended(answers[i]) else set()
        if not unfinished:
            break
        written = torch.cat([written, tokens[:, None]], 1)
    return answers


@torch.no_grad()
def written(
    body: nn.Module,
    head: Callable[[torch.Tensor], torch.Tensor],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ended: Callable[[Sequence[int]], bool],
    pad: int,
    prefix: Prefix | None = None,
    pick: Pick = likeliest,
) -> list[list[int]]:
    """The token that is picked each time, for prompts of any lengths at once (padded on the left).

    The loop is written here, and not `generate` of transformers, because that takes penalties and sampling from the
    model's own generation_config.json.

    Args:
        body: of a decoder.
        head: hidden states (rows, hidden_size) -> logits (rows, vocabulary).
        prompts: token ids.
        max_new_tokens: most tokens of an answer.
        ended: whether an answer is over with its last token.
        pad: token id to pad with.
        prefix: keys and values that come before every prompt's.
        pick: of the logits of all prompts' next tokens.

    Returns:
        Token ids of each answer, its last one included.
    """
    window, config = family_of(body.config).window, body.config
    windowed = any(window(config, layer) for layer in range(config.num_hidden_layers))
    if prefix and windowed and len(set(map(len, prompts))) > 1:
        # the padding would lie between prefix and prompt, and count as places of the window
        alone = []
        for row, prompt in enumerate(prompts):
            own = lambda logits, place, row=row: pick(logits.expand(len(prompts), -1), place)[row : row + 1]  # noqa: E731
            alone += written(body, head, [prompt], max_new_tokens, ended, pad, prefix, own)
        return alone
    device, width, before = body.device, max(map(len, prompts)), prefix.tokens if prefix else 0
    ids = torch.tensor([[*[pad] * (width - len(prompt)), *prompt] for prompt in prompts], device=device)
    mask = torch.tensor([[*[0] * (width - len(prompt)), *[1] * len(prompt)] for prompt in prompts], device=device)
    mask = nn.functional.pad(mask, (before, 0), value=1)
    cache = prefix.cache(len(prompts)) if prefix else DynamicCache(config=body.config)
    answers, unfinished = [[] for _ in prompts], set(range(len(prompts)))
    for place in range(max_new_tokens):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        known = {cache_argument(body): cache, "use_cache": True}
        out = body(input_ids=ids, attention_mask=mask, position_ids=positions, **known).last_hidden_state
        tokens = pick(head(out[:, -1]), place)
        for i, token in enumerate(tokens.tolist()):
            if i in unfinished:
                answers[i].append(token)
                unfinished -= {i} if ended(answers[i]) else set()
        if not unfinished:
            break
        # a row that has ended goes on unread: the others keep their batch
        ids, mask = tokens[:, None], nn.functional.pad(mask, (0, 1), value=1)
    return answers
