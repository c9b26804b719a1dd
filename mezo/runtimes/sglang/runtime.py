"""The SGLang runtime: the inference engine computes the losses of both signs in one batch, and keeps what is exact."""

import dataclasses
import functools
import json
import math
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from safetensors.torch import load_file

from mezo.config import Machine, Model, SGLang, Workload
from mezo.data.example import Example
from mezo.data.large import CACHED, LargeExamples, looked_at
from mezo.errors import RunError, UserError
from mezo.method.sampling import Sampling
from mezo.method.step import Step, Update
from mezo.models.linear import Product, tell
from mezo.models.load import Checkpoint
from mezo.models.parts import load_parts
from mezo.models.spec import ENGINE, NONE
from mezo.progress import log, waiting
from mezo.runtimes.base import TokenCount
from mezo.runtimes.calibration import calibrate
from mezo.runtimes.generation import Writing, refuse_too_long
from mezo.runtimes.rows import Row, measured, most_rows, most_tokens, padded, rows_by_example, scores_of
from mezo.runtimes.sglang.answers import SCORE_ONLY, count_tokens, sampling_of, start_of, table_of
from mezo.runtimes.sglang.arguments import (
    backend_of,
    call_tokens,
    check_device,
    check_heads,
    check_version,
    default_dtype,
    engine_arguments,
    engine_options,
    largest_call,
    pairs_of,
    placeholder_of,
    product_of,
    refuse_small_limits,
    write_placeholders,
)
from mezo.runtimes.sglang.engine import EngineHandle, accelerated
from mezo.runtimes.sglang.proof import StartProof
from mezo.runtimes.sglang.reuse import PrefixCache
from mezo.runtimes.sglang.scratch import Scratch, bytes_of
from mezo.runtimes.sglang.support import (
    model_class,
    refuse_inexact,
    refuse_packed,
    refuse_small_shared_memory,
    refuse_window,
    refuse_without_lora,
)
from mezo.runtimes.sides import Sides

FLUSH_SECONDS = 10.0
TOGETHER = 0.1  # eps at which adapters that share a batch are compared with each alone
Asked = list[tuple[tuple[str, ...], int]]
"""Numbers of examples, each with the slots that are asked about it."""


class SGLangRuntime:
    """An SGLang engine with MeZO's state in each tensor-parallel worker; implements `Runtime`, `InitialTheta`, `Grows`
    and `Follower`.

    A step is two messages: one call that updates theta and writes both signs into the engine's adapter slots, with
    scalars alone, and one batch of requests that scores them.

    KV is reused within one version of theta, whose cache namespace is its own. Where no key or value depends on theta
    all versions and both signs share one namespace, and a prompt seen before costs one token.

    Args:
        model: which, and what is trained of it.
        machine: where it runs, with options of this runtime.
        work: what the run asks for.
        pad: token id to pad with.
        checkpoint: of the model, if its configuration has been read.
    Raises:
        UserError: SGLang will not do, or this model, device or option with it.
    """

    shares = False  # whether requests of others may be in the trainer's forward passes

    def __init__(
        self, model: Model, machine: Machine, work: Workload, pad: int = 0, checkpoint: Checkpoint | None = None
    ):
        check_version()
        check_device(machine.device)
        self.machine, self.work, self.pad = machine, work, pad
        self.runtime: SGLang = machine.runtime
        self.options = engine_options(self.runtime) | ({"trust_remote_code": True} if model.trust_remote_code else {})
        self.checkpoint = checkpoint or Checkpoint.of(model.base, trusted=model.trust_remote_code)
        if self.checkpoint.masked:
            raise UserError(f"--model {model.base}: it fills masks, which SGLang does not score: use --runtime hf")
        self._served = model_class(self.checkpoint)
        refuse_inexact(self.checkpoint, self._served)
        refuse_packed(self.checkpoint, self.options)
        check_heads(self.runtime.tp, self.checkpoint)
        refuse_small_shared_memory(self.runtime.tp, shutil.disk_usage("/dev/shm").free)
        self.pairs = pairs_of(work.perturbations, self.options)
        self.backend = backend_of(machine.backend)
        dtype = getattr(torch, model.dtype) if model.dtype != "auto" else default_dtype()
        quantised = bool(self.options.get("quantization") or self.checkpoint.quantised)
        self.product = product_of(self.runtime, self.checkpoint, dtype, quantised)
        self._parts, self.spec = load_parts(model, torch.device("cpu"), dtype, checkpoint=self.checkpoint)
        self.dtype = self.spec.dtype
        if self.options.get("quantization"):  # another base: a run is not resumed without it
            self.spec = dataclasses.replace(self.spec, quantization=f"{ENGINE}{self.options['quantization']}")
        refuse_without_lora(self.checkpoint, self._served, self.spec.adapter)
        self.kv_depends, self._initial = self._parts.kv_depends, self._parts.attached.initial
        rule = work.rule
        rule.check_patterns(self.spec.shapes)
        self.rule, self.sides = json.dumps(rule.header() or {}), Sides(rule.rule.one_sided, rule.rule.guides)
        self.device = torch.device("cpu")
        radix = self.runtime.radix == "auto"
        self.cache = PrefixCache(used=radix, shared=radix and self.kv_depends is None)
        self.tokens, self.eval_tokens = TokenCount(), TokenCount()
        self.seconds = dict.fromkeys(("kernels", "rpc", "engine"), 0.0)
        self.seconds_filling, self.tokens_filled, self.seconds_proving = 0.0, 0, 0.0
        self.batch_noise = 0.0
        self.engine: EngineHandle | None = None
        self._scratch: Scratch | None = None
        self._sent, self._showing = Counter(), "perturbed"
        self._calls, self.divided = 0, 0
        self._held = 1
        self.writing = Writing.of(self.checkpoint) if work.max_new_tokens else None

    def prepare(self, splits: dict[str, Sequence[Example]], adapter: str = "") -> None:
        """See `Runtime.prepare`. Starts the engine and proves that it scores as the model itself does."""
        self.examples, self.adapter = splits, adapter
        self.rows = {split: rows_by_example(examples) for split, examples in splits.items()}
        self._check_lengths()
        if self.runtime.follows:  # the first machine proves and scores
            self._launch()
            return
        if "train" in self.rows and not self.work.done:  # a run that goes on has what it froze in a file
            calibrate(self._parts, self.rows["train"], self.pad)
        began = time.perf_counter()
        frozen = {name: p.detach().float() for name, p in self._parts.attached.frozen.items()}
        quantised = self.spec.quantization != NONE or self.checkpoint.quantised
        exact = self.dtype == "float32" and not quantised
        with waiting("computing what the engine must find, on a few examples"):
            self.proof = StartProof(self._parts, exact, self._all_rows(), self.pad, adapter)
        self._parts = None
        self.seconds_proving = time.perf_counter() - began
        self._launch()
        began = time.perf_counter()
        with waiting("proving that the engine scores as transformers and PEFT do"):
            tables = []
            for seed in StartProof.SEEDS:
                self.load(frozen | self.proof.adapter(seed))
                tables += self._tables_of_proof()
                self.proof.check(seed, tables[-len(self.proof.rows) :])
            if not exact and not quantised:
                self.proof.check_fine(tables)
            self.batch_noise = self._prove_together()
        self.seconds_proving += time.perf_counter() - began
        self._flush()  # a prompt's first visit is the run's own, and is counted
        self.load(frozen | {name: torch.zeros(shape) for name, shape in self.spec.shapes.items()})
        self.engine.training = True

    def refuse_further(self, examples: Sequence[Example]) -> None:
        """See `Grows.refuse_further`. A forward pass has room for all copies of one example."""
        seen, new = rows_by_example(examples), self.work.max_new_tokens
        most, tokens = most_rows(self.rows["train"]), max(most_tokens([rows]) for rows in seen) + new
        if (rows := most_rows(seen)) > most:
            raise UserError(f"options: a row has {rows} that are scored apart, those of the run have at most {most}")
        if tokens > (limit := self.call_tokens // (2 * self.pairs)):
            raise UserError(f"an example has {tokens} tokens, this engine has room for {limit}: shorten it")
        longest = max(len(row.ids) for rows in seen for row in rows)
        refuse_too_long(self.work, {"train": examples}, longest, self._limit)
        refuse_window(self.checkpoint, self._served, longest + new)
        vocabulary = self.checkpoint.config.get_text_config().vocab_size
        if max(token for rows in seen for row in rows for token in row.ids) >= vocabulary:
            raise UserError(f"an example has a token that the model has no embedding of: it has {vocabulary:,}")

    def grow(self, split: str, examples: Sequence[Example]) -> None:
        """See `Grows.grow`."""
        self.refuse_further(examples)
        self.examples = {**self.examples, split: [*self.examples[split], *examples]}
        self.rows = {**self.rows, split: [*self.rows[split], *rows_by_example(examples)]}

    def prove_adapter(self) -> None:
        """See `Runtime.prove_adapter`."""
        if not self.adapter:
            return
        self.proof.check_adapter(self._tables_of_proof())
        self._flush()

    def _tables_of_proof(self) -> list[list[dict[int, float]]]:
        """Log-probabilities of the proof's rows by the engine, under theta."""
        self._show("theta")
        self._warm({("plus0",): [[row] for row in self.proof.rows]}, TokenCount())
        return self._read([("plus0", row) for row in self.proof.rows], TokenCount())

    def _prove_together(self) -> float:
        """By how much log-probabilities of adapters of other effects in one batch differ from those of each alone.

        Raises:
            UserError: by more than the engine's may differ from the model's.
        """
        self.perturb(Step(range(self.pairs), TOGETHER))
        slots = [f"{sign}{k}" for k in sorted({0, self.pairs - 1}) for sign in ("plus", "minus")]
        together = self._read([(slot, row) for slot in slots for row in self.proof.rows], TokenCount())
        alone = []
        for slot in slots:
            self._flush()
            alone += self._read([(slot, row) for row in self.proof.rows], TokenCount())
        noise = self.proof.between(together, alone)
        if not noise <= self.proof.allowed:
            raise UserError(
                f"--runtime sglang: adapters in one batch change each other's log-probabilities by {noise:.2g} (allowed"
                f" {self.proof.allowed:.2g}); try --engine-graphs off, --engine-arg lora_backend=..., or --runtime hf"
            )
        return noise

    def _check_lengths(self) -> None:
        limit = self._parts.position_limit
        self._limit = None if limit is None else limit - 1  # the engine keeps a place for a token after the prompt
        seen = {split: looked_at(examples) for split, examples in self.examples.items()}
        refuse_too_long(self.work, seen, self._longest(), self._limit)
        longest = self._longest() + self.work.max_new_tokens
        refuse_window(self.checkpoint, self._served, longest)
        self._requests, tokens = largest_call(self.machine, self.work, self.rows, self.pairs)
        self.call_tokens = call_tokens(tokens)
        refuse_small_limits(self.options, min(tokens, self.call_tokens), longest + 1)

    def _all_rows(self) -> list[Row]:
        """The rows of all splits; of a large one those that are looked at."""
        return [row for nested in self.rows.values() for i in measured(nested) for row in nested[i]]

    def _longest(self) -> int:
        large = [examples.max_length for examples in self.examples.values() if isinstance(examples, LargeExamples)]
        return max([*(len(row.ids) for row in self._all_rows()), *large])

    def _resident(self) -> int:
        """Tokens of the rows that a run comes back to: of a large split as many as are held here."""
        total = 0
        for nested in self.rows.values():
            known = [sum(len(row.ids) for row in nested[i]) for i in measured(nested)]
            total += sum(known) * min(len(nested), max(CACHED, len(known))) // len(known)
        return total

    def _launch(self) -> None:
        resident = self._resident() if self.cache.shared else 0
        zeros, beside = placeholder_of(self.options, self.spec, self.checkpoint)
        needed = bytes_of(zeros) + 4 * sum(map(math.prod, self.spec.shapes.values()))
        self._scratch = Scratch(self.machine.output_dir, needed, beside)
        adapters = write_placeholders(self._scratch, zeros, beside, self.spec, self._slots())
        arguments = engine_arguments(
            self.runtime,
            self.work.seed,
            self.options,
            self.dtype,
            self.spec,
            adapters,
            self.call_tokens,
            resident,
            self._requests,
        )
        with waiting(f"starting the SGLang engine on {'GPU' if accelerated() else 'CPU'}, which takes a minute or so"):
            self.engine = self._started(arguments)
        if self.runtime.follows:
            return
        shapes, frozen = map(json.dumps, (self.spec.shapes, self.spec.frozen))
        options = {"pairs": self.pairs, "share": self.cache.shared, "backend": self.backend, "rule": self.rule}
        options["packed"] = self.product.name == "packed"
        self.ranks = self._call("setup", shapes=shapes, frozen=frozen, **options)
        nbytes = sum(rank["packed"] for rank in self.ranks)
        if self.product.name == "packed" and not nbytes:
            self.product = Product("torch", "products are the engine's own: it has laid its weights out itself")
        if not accelerated():
            tell(self.product, nbytes)

    @property
    def linear(self) -> str:
        """What multiplies by the frozen weights, as --linear names it."""
        return self.product.name

    def _slots(self) -> list[str]:
        """Names of the slots that the engine has."""
        return [f"{sign}{k}" for k in range(self.pairs) for sign in ("plus", "minus")]

    def _started(self, arguments: dict) -> EngineHandle:
        return EngineHandle(arguments, self._scratch)

    def follow(self) -> None:
        """See `Follower.follow`."""
        self.engine.follow()

    def load(self, theta: dict[str, torch.Tensor]) -> None:
        """See `Runtime.load`. Theta goes through a file: at the start of a run and at its end, never in a step."""
        path = self._scratch.path / "theta.safetensors"
        names = [*self.spec.shapes, *(name for name in self.spec.frozen if name in theta)]
        self._scratch.save({name: theta[name].float().contiguous() for name in names}, path)
        self._call("load", path=str(path))
        path.unlink()
        self.sides.loaded()
        self._changed("stale")

    def initial_theta(self, run_seed: int) -> dict[str, torch.Tensor]:
        """See `InitialTheta.initial_theta`."""
        return self._initial(run_seed)

    def theta(self) -> dict[str, torch.Tensor]:
        """See `Runtime.theta`."""
        path = self._scratch.path / "theta.safetensors"
        self._call("save", path=str(path))
        full = load_file(path)
        path.unlink()
        return {name: full[name] for name in self.spec.shapes}

    def update(self, updates: Sequence[Update], then: Step | None = None, *, watch: bool = False) -> None:
        """See `Runtime.update`: one call with scalars, one fused pass in every worker."""
        step = None if then is None else dataclasses.asdict(then)
        message = json.dumps({"updates": [dataclasses.asdict(update) for update in updates], "then": step})
        answers = self._call("update", message=message, watch=watch)
        slowest = max(answer["seconds"] for answer in answers)
        self.seconds["kernels"] += slowest
        self.seconds["rpc"] -= slowest
        self._held = len(then or ())
        self.sides.written(theta_changed=bool(updates), along=bool(then and then.weights))
        self._changed("perturbed")

    def perturb(self, step: Step, *, watch: bool = False) -> None:
        """See `Runtime.perturb`."""
        self.update([], step, watch=watch)

    def equalise(self) -> None:
        """See `Runtime.equalise`. One pair tells as much as all."""
        self._show("equal")
        self.sides.equalised()
        self._held = 1

    def verify(self) -> str | None:
        """See `Runtime.verify`: every rank compares its shard and its slots of the engine's pool."""
        if self._showing != "perturbed":
            self._show("perturbed")
        answers = [(rank, answer["difference"]) for rank, answer in enumerate(self._call("verify"))]
        return next((f"rank {rank}: {difference}" for rank, difference in answers if difference), None)

    def score_pairs(
        self, split: str, indices: Sequence[int], shares: Sequence[Sequence[int]] | None = None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """See `Runtime.score_pairs`. One batch of requests holds both signs of every perturbation."""
        return self._pairs("scores", split, indices, shares, functools.partial(self._score, split))

    def score(self, split: str, indices: Sequence[int]) -> torch.Tensor:
        """See `Runtime.score`. Theta, rounded once, is written to one slot; the next pair finds its slots restored."""
        if self._showing != "theta":
            self._show("theta")
        return self._score(split, [(("plus0",), i) for i in indices], self.eval_tokens)["plus0"]

    def generate_pairs(
        self,
        split: str,
        indices: Sequence[int],
        max_new_tokens: int,
        stop: Sequence[str],
        shares: Sequence[Sequence[int]] | None = None,
        sampling: Sampling | None = None,
    ) -> list[tuple[list[str], list[str]]]:
        """See `Runtime.generate_pairs`. One batch of requests holds both signs of every perturbation."""
        write = functools.partial(self._write, split, new=max_new_tokens, stop=stop, sampling=sampling)
        return self._pairs(("texts", sampling), split, indices, shares, write)

    def _pairs(
        self, kind: Hashable, split: str, indices: Sequence[int], shares: Sequence[Sequence[int]] | None, ask: Callable
    ) -> list[tuple]:
        """What is read at both signs of every perturbation.

        Args:
            kind: of what is read.
            split, indices, shares: see `Runtime.score_pairs`.
            ask: from what is asked, and where tokens count, what each slot answers.
        """
        count = self._pairs_shown()
        if shares is not None:
            names = [(f"plus{k}", f"minus{k}") for k in range(len(shares))]
            asked = [(pair, indices[i]) for pair, share in zip(names, shares, strict=True) for i in share]
            answers = ask(asked, count)
            return [tuple(answers.get(name, []) for name in pair) for pair in names]

        def read(names: list[str]) -> list:
            answers = ask([(tuple(names), i) for i in indices], count)
            return [answers[name] for name in names]

        return self.sides.pairs(self._held, (kind, split, *indices), read)

    def generate(self, split: str, indices: Sequence[int], max_new_tokens: int, stop: Sequence[str]) -> list[str]:
        """See `Runtime.generate`."""
        if self._showing != "theta":
            self._show("theta")
        return self._write(split, [(("plus0",), i) for i in indices], self.eval_tokens, max_new_tokens, stop)["plus0"]

    def _pairs_shown(self) -> TokenCount:
        """Have the slots show the pairs they hold; returns where their tokens count."""
        assert self._showing != "stale", "load() leaves the copies behind: perturb() first"
        if self._showing == "theta":
            self._show("perturbed")
        if self._showing == "equal":
            self._changed("equal")  # each measurement of noise finds the cache as a step does
        return self.tokens if self._showing == "perturbed" else self.eval_tokens

    def describe(self) -> str:
        """See `Runtime.describe`."""
        n = sum(map(math.prod, self.spec.shapes.values()))
        if self.runtime.radix == "off":
            cache = "radix cache off"
        elif self.cache.shared:
            cache = "one radix namespace for all: no key or value depends on theta"
        else:
            cache = f"a radix namespace for each version of theta ({self.kv_depends})"
        ranks = f"tensor parallel {self.runtime.tp}" if self.runtime.tp > 1 else "one rank"
        packed = "" if self.spec.quantization == NONE else f" {self.spec.quantization.removeprefix(ENGINE)}"
        return f"{n:,} LoRA parameters, {self.spec.dtype}{packed} base in SGLang, {ranks}, {cache}"

    def close(self) -> None:
        """See `Runtime.close`."""
        try:
            if self.engine is not None:
                self.engine.close()
        finally:
            if self._scratch is not None:
                self._scratch.close()
            self.engine = self._scratch = None

    def _call(self, method: str, **parameters) -> list[dict]:
        began = time.perf_counter()
        answers = self.engine.call(method, **parameters)
        self.seconds["rpc"] += time.perf_counter() - began
        if "requests" in answers[0]:
            self._check_requests(answers)
        return answers

    def _check_requests(self, answers: list[dict]) -> None:
        """Every request named a slot of ours, on every rank: one that named none was scored by the base model."""
        for rank, answer in enumerate(answers):
            if answer["requests"] != dict(self._sent):
                raise RunError(
                    f"rank {rank} of the engine saw the requests {answer['requests']}, sent were {dict(self._sent)}:"
                    " some were not scored by the adapter they belong to"
                )
        self._count_passes(max(answer["passes"] for answer in answers))
        self._sent.clear()

    def _count_passes(self, passes: int) -> None:
        """Every batch of requests was one forward pass, so that both signs of a step have the rounding of one; else say
        so, once."""
        if passes > self._calls:
            if not self.divided and not self.shares:
                log.warning(
                    "the engine computed %d batches of requests in %d forward passes: the two signs of a step may be"
                    " rounded differently; raise what --engine-arg limits, or lower --micro-batch-size",
                    self._calls,
                    passes,
                )
            self.divided += passes - self._calls
        self._calls = 0

    def _flush(self) -> None:
        """Forget all keys and values; the engine is given a moment to end its last batch."""
        deadline = time.monotonic() + FLUSH_SECONDS
        while not all(answer["flushed"] for answer in self._call("flush")):
            if time.monotonic() > deadline:
                raise RunError(f"the SGLang engine did not flush its cache within {FLUSH_SECONDS} s")
            time.sleep(0.01)
        self.cache.flushed()

    def _changed(self, showing: str) -> None:
        """The slots hold something else."""
        self._showing = showing
        self.cache.theta_changed()

    def _show(self, what: str) -> None:
        self._call("show", what=what)
        self._changed(what)

    def _rows_at(self, split: str, asked: Asked) -> dict[int, list[Row]]:
        """The rows of the examples that are asked about; those of a large split are tokenised at once."""
        if isinstance(self.examples[split], LargeExamples):
            self.examples[split].fetch([i for _, i in asked])
        return {i: self.rows[split][i] for i in dict.fromkeys(i for _, i in asked)}

    def _score(self, split: str, asked: Asked, count: TokenCount) -> dict[str, torch.Tensor]:
        """Option scores of the examples of each slot."""
        rows, scores = self._rows_at(split, asked), defaultdict(list)
        for part in self._parts_of(asked, lambda i: sum(len(row.ids) for row in rows[i])):
            self._warm(_grouped(part, rows), count)
            of_slots = _by_slot(part)
            requests = [(name, row) for name, examples in of_slots.items() for i in examples for row in rows[i]]
            tables = iter(self._read(requests, count))
            for name, examples in of_slots.items():
                asked_rows = [row for i in examples for row in rows[i]]
                answers = [next(tables) for _ in asked_rows]
                scores[name].append(scores_of([self.examples[split][i] for i in examples], asked_rows, answers))
        self._call("report")  # no score leaves before every rank has said whose requests it saw
        return {name: padded(parts) for name, parts in scores.items()}

    def _write(
        self,
        split: str,
        asked: Asked,
        count: TokenCount,
        new: int,
        stop: Sequence[str],
        sampling: Sampling | None = None,
    ) -> dict[str, list[str]]:
        """Texts of at most `new` tokens after the prompts of the examples of each slot."""
        self._rows_at(split, asked)
        prompts, texts = {i: self.examples[split][i].prompt for _, i in asked}, defaultdict(list)
        rows = {i: [Row(prompts[i], (len(prompts[i]) - 1,), ())] for _, i in asked}
        for part in self._parts_of(asked, lambda i: len(prompts[i]) + new):
            self._warm(_grouped(part, rows), count)
            each = [(name, i) for name, examples in _by_slot(part).items() for i in examples]
            requests = [(name, prompts[i]) for name, i in each]
            wanted = sampling_of([i for _, i in each], new, stop, self.writing.ends, sampling)
            answers = self._generate(requests, count, wanted)
            for (name, _), answer in zip(requests, answers, strict=True):
                texts[name].append(self.writing.text(answer["output_ids"], stop))
        self._call("report")
        return texts

    def _parts_of(self, asked: Asked, tokens_of: Callable[[int], int]) -> list[Asked]:
        """What is asked, divided into forward passes of the engine: the slots of an example always together."""
        parts, tokens = [[]], 0
        for names, i in asked:
            more = len(names) * tokens_of(i)
            if tokens and tokens + more > self.call_tokens:
                parts.append([])
                tokens = 0
            parts[-1].append((names, i))
            tokens += more
        return parts

    def _read(self, requests: Sequence[tuple[str, Row]], count: TokenCount) -> list[list[dict]]:
        """For every (slot, row) the log-probabilities of the row's candidates at each scored position."""
        answers = self._generate(
            [(name, row.ids) for name, row in requests],
            count,
            return_logprob=True,
            logprob_start_len=[start_of(row) for _, row in requests],
            token_ids_logprob=[sorted({t for target in row.targets for t in target}) for _, row in requests],
        )
        return [table_of(row, answer) for (_, row), answer in zip(requests, answers, strict=True)]

    def _warm(self, groups: Mapping[tuple[str, ...], Sequence[Sequence[Row]]], count: TokenCount) -> None:
        """Send what the requests to come share ahead of them; `groups`: rows of examples by the slots they go to."""
        for wave in self.cache.ahead(groups):
            self._generate(wave, count)

    def _generate(
        self,
        requests: Sequence[tuple[str, Sequence[int]]],
        count: TokenCount,
        sampling: dict | list[dict] = SCORE_ONLY,
        **wanted,
    ) -> list[dict]:
        """Send (slot, token ids) as one batch of requests; count the tokens as the engine counts them."""
        began = time.perf_counter()
        answers = self.engine.generate(
            input_ids=[list(ids) for _, ids in requests],
            lora_path=[name for name, _ in requests],
            sampling_params=sampling,
            cache_salt=self.cache.namespace or None,
            **wanted,
        )
        self.seconds["engine"] += time.perf_counter() - began
        self._calls += 1
        self._sent.update(name for name, _ in requests)
        for (_, ids), answer in zip(requests, answers, strict=True):
            count_tokens(ids, answer, count)
        return answers


def _by_slot(asked: Asked) -> dict[str, list[int]]:
    """The examples that each slot is asked about, slots in the order in which they first come.

    >>> _by_slot([(("plus0", "minus0"), 4), (("plus0", "minus0"), 7)])
    {'plus0': [4, 7], 'minus0': [4, 7]}
    """
    examples = defaultdict(list)
    for names, i in asked:
        for name in names:
            examples[name].append(i)
    return dict(examples)


def _grouped(asked: Asked, rows: Mapping[int, list[Row]]) -> dict[tuple[str, ...], list[list[Row]]]:
    """The rows of the examples, by the slots that they are asked under."""
    groups = defaultdict(list)
    for names, i in asked:
        groups[names].append(rows[i])
    return dict(groups)
