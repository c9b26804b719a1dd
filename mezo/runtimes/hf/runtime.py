"""The in-process runtime: transformers computes the losses, the trunk cache saves what theta cannot change."""

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from mezo.config import HF, Machine, Model, Workload
from mezo.data.example import Example
from mezo.errors import UserError
from mezo.method.step import Step, Update
from mezo.models.full import save_model
from mezo.models.head import head_logits
from mezo.models.parts import load_parts, position_limit
from mezo.models.prefix import PROMPT, real_activations, vocabulary_tokens
from mezo.runtimes.base import TokenCount
from mezo.runtimes.generation import Writing, greedy, refuse_too_long
from mezo.runtimes.hf.trunk import GROUP, Trunk, no_cache
from mezo.runtimes.reference import reference_log_probs
from mezo.runtimes.rows import RowBatch, by_length, option_scores, rows_of, scored
from mezo.runtimes.sides import Sides
from mezo.runtimes.theta import PerturbedTheta
from mezo_kernels import ParamLayout, available_backends, lora_init

CALL = 48  # tokens whose time a forward pass of none takes on a CPU, where the weights are read for each call
WATCHED = 1 << 20  # elements of a whole model that a watched step compares with the reference
PROOF_EXAMPLES = 3  # besides the longest
PROOF_NOISE = 1e-3  # standard deviation of what is added to a base that is trained itself
PROOF_TOLERANCE = 1e-4  # on option log-probabilities in float32; shapes differ, so sums are ordered differently


class HFRuntime:
    """transformers + PEFT on one device; implements `mezo.runtimes.base.Runtime`.

    The float32 master and the two perturbed copies lie beside the model; a copy is put to use by pointing the
    trained parameters at it, so nothing is copied and nothing is ever restored by arithmetic. Where the base itself
    is trained nothing else is left of it: 12 bytes a parameter in float32, 8 in 16 bits.
    """

    pairs = 1

    def __init__(self, model: Model, machine: Machine, work: Workload, pad: int = 0):
        self.device = _device(machine.device)
        self.dtype = _dtype(model.dtype, self.device)
        self.backend = None if machine.backend == "auto" else machine.backend
        _check_backend(self.backend, self.device)
        self.parts, self.spec = load_parts(model, self.device, self.dtype, work.classes)
        self.tokens, self.eval_tokens = TokenCount(), TokenCount()
        self.pad, self.work, self.source = pad, work, model.base
        self.options: HF = machine.runtime
        self.params = list(self.parts.params.values())
        self.whole = self.spec.peft is None
        empty = lambda dtype: [torch.zeros_like(p, dtype=dtype) for p in self.params]  # noqa: E731
        start = [p.data.float() for p in self.params] if self.whole else empty(torch.float32)
        self.master = ParamLayout(dict(zip(self.spec.shapes, start, strict=True)))
        self.plus, self.minus = self.master.like(empty(self.dtype)), self.master.like(empty(self.dtype))
        self.copies = {"plus0": self.plus, "minus0": self.minus}
        rule = work.rule
        rule.check_patterns(self.master.names)
        watched = WATCHED if self.whole else None
        self.perturbed = PerturbedTheta(self.master, [(self.plus, self.minus)], self.backend, rule, watched)
        self.sides = Sides(rule.rule.one_sided)
        self.seconds = dict.fromkeys(("kernels", "forward"), 0.0)
        self.examples: dict[str, Sequence[Example]] = {}
        self.trunk: Trunk | None = None
        self.writing = Writing.of(model.base) if work.max_new_tokens else None
        self.vocabulary = "lm_cross_entropy" in work.objectives
        if self.writing and not self.parts.causal:
            raise UserError(f"--model {model.base} fills masks and generates no text: use another model")

    def prepare(self, splits: dict[str, Sequence[Example]]) -> None:
        """See `Runtime.prepare`. Raises UserError if the trunk cache is not exact on this model."""
        self.examples = splits
        self.rows = {split: [rows_of(example) for example in examples] for split, examples in splits.items()}
        self.first_row = {split: _starts(rows) for split, rows in self.rows.items()}
        self._check_lengths()
        options = [example.options for examples in splits.values() for example in examples]
        # scores up to a constant compare options of one token each; longer ones, or one alone, need log-probabilities
        self.vocabulary |= any(len(own) == 1 or any(len(option) > 1 for option in own) for own in options)
        needless = self.parts.first == 0 or not self.work.scores
        if self.options.trunk_cache in ("cpu", "device") and needless:
            why = "layer 0 is adapted, nothing lies below it; use --layers-to-transform or auto"
            if not self.work.scores:
                names = ", ".join(self.work.objectives)
                why = f"--objective {names} generates text, which takes nothing from it; use auto"
            raise UserError(f"--trunk-cache: {why}")
        if self.options.trunk_cache == "off" or needless:
            self._prove(
                "--model", "the model changes its hidden states or logits after its layers or head, unsupported"
            )
        else:
            self._prepare_trunk()

    def _check_lengths(self) -> None:
        refuse_too_long(self.work, self.examples, self._longest(), position_limit(self.parts), self._prefix())

    def _prefix(self) -> int:
        return self.parts.prefix.tokens if self.parts.prefix else 0

    def _longest(self) -> int:
        return max(len(row.ids) for nested in self.rows.values() for own in nested for row in own)

    def _prepare_trunk(self) -> None:
        """Prove the trunk exact, then fill it; a training set too large to be seen once is filled as it is drawn."""
        self.trunk = self._trunk()
        rows = {split: [row for own in nested for row in own] for split, nested in self.rows.items()}
        drawn = self.work.steps * self.work.batch_size
        later = {split for split in rows if split == "train" and drawn < len(self.examples[split])}
        for split in rows:
            self.trunk.register(split, rows[split], group=1 if split in later else GROUP)
        self._prove("--trunk-cache", "use --trunk-cache off")
        self.trunk.clear()
        for split in [split for split in rows if split not in later]:
            count = self.tokens if split == "train" else self.eval_tokens
            count.computed += self._trunk_share(self.trunk.fill(split))

    @property
    def seconds_filling(self) -> float:
        """Time spent filling the trunk cache so far."""
        return self.trunk.seconds if self.trunk else 0.0

    def load(self, theta: dict[str, torch.Tensor]) -> None:
        """See `Runtime.load`."""
        for name, tensor in zip(self.master.names, self.master.tensors, strict=True):
            tensor.copy_(theta[name])
        self.perturbed.forget()
        self.sides.loaded()

    def initial_theta(self, run_seed: int) -> dict[str, torch.Tensor]:
        """See `Runtime.initial_theta`: the prefix of real tokens, drawn from the vocabulary by the seed of the run."""
        body, n = self.parts.body, self.parts.prefix.tokens
        return {PROMPT: real_activations(body, vocabulary_tokens(n, body.config.vocab_size, run_seed))}

    def theta(self) -> dict[str, torch.Tensor]:
        """See `Runtime.theta`."""
        tensors = (t.detach().to("cpu", copy=True) for t in self.master.tensors)
        return dict(zip(self.master.names, tensors, strict=True))

    def update(self, updates: Sequence[Update], then: Step | None = None, *, watch: bool = False) -> None:
        """See `Runtime.update`: one fused pass."""
        with self._timed("kernels"):
            self.perturbed.update(updates, then, watch=watch)
        self.sides.written(theta_changed=bool(updates))

    def perturb(self, step: Step, *, watch: bool = False) -> None:
        """See `Runtime.perturb`."""
        self.update([], step, watch=watch)

    def equalise(self) -> None:
        """See `Runtime.equalise`."""
        self.perturbed.show([self.plus, self.minus])
        self.sides.equalised()

    def verify(self) -> str | None:
        """See `Runtime.verify`: what is compared is what the model's parameters point at."""
        return self.perturbed.verify([self._use(copy) for copy in (self.plus, self.minus)])

    @torch.no_grad()
    def score_pairs(self, split: str, indices: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """See `Runtime.score_pairs`. Both signs run on the same gathered batch."""

        def read(names: list[str]) -> list[torch.Tensor]:
            return self._with_each(names, self._forward(split, indices, self.tokens, signs=len(names)))

        with self._timed("forward"):
            return self.sides.pairs(1, ("scores", split, *indices), read)

    @torch.no_grad()
    def score(self, split: str, indices: Sequence[int]) -> torch.Tensor:
        """See `Runtime.score`. A 16-bit model sees theta rounded once."""
        self._point([t.to(self.dtype) for t in self.master.tensors])
        return self._forward(split, indices, self.eval_tokens, signs=1)()

    def generate(self, split: str, indices: Sequence[int], max_new_tokens: int, stop: Sequence[str]) -> list[str]:
        """See `Runtime.generate`. The trunk cache has no part in it: a text is new at every theta."""
        self._point([t.to(self.dtype) for t in self.master.tensors])
        return self._write(split, indices, max_new_tokens, stop, self.eval_tokens)

    def generate_pairs(
        self, split: str, indices: Sequence[int], max_new_tokens: int, stop: Sequence[str]
    ) -> list[tuple[list[str], list[str]]]:
        """See `Runtime.generate_pairs`."""

        def read(names: list[str]) -> list[list[str]]:
            return self._with_each(names, lambda: self._write(split, indices, max_new_tokens, stop, self.tokens))

        with self._timed("forward"):
            return self.sides.pairs(1, ("texts", split, *indices), read)

    def _with_each(self, names: Sequence[str], run: Callable) -> list:
        """What `run` returns with each of these copies in use, in order."""
        found = []
        for name in names:
            self._use(self.copies[name])
            found.append(run())
        return found

    def _write(self, split, indices, max_new_tokens: int, stop: Sequence[str], count: TokenCount) -> list[str]:
        """Texts with the weights in use; a token of an answer is run to find the next, so the last one never is."""
        prompts = [self.examples[split][i].prompt for i in indices]
        ended = lambda ids: self.writing.ended(ids, stop)  # noqa: E731
        answers = greedy(self.parts.body, self.parts.head, prompts, max_new_tokens, ended, self.pad, self.parts.prefix)
        tokens = sum(len(prompt) + len(answer) - 1 for prompt, answer in zip(prompts, answers, strict=True))
        count.scored, count.computed = count.scored + tokens, count.computed + tokens
        return [self.writing.text(answer, stop) for answer in answers]

    def gradient(
        self, split: str, indices: Sequence[int], loss: Callable[[torch.Tensor], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """See `Runtime.gradient`. A 16-bit model is differentiated where theta rounds to, in its own precision."""
        with torch.no_grad():
            forward = self._forward(split, indices, self.eval_tokens, signs=1)
        self._point([t.to(self.dtype) for t in self.master.tensors])
        for p in self.params:
            p.requires_grad_(True)
        try:
            grads = torch.autograd.grad(loss(forward()), self.params, materialize_grads=True)
        finally:
            self.parts.model.requires_grad_(False)
        return {name: g.float().cpu() for name, g in zip(self.master.names, grads, strict=True)}

    def save_model(self, directory: Path) -> None:
        """See `Runtime.save_model`."""
        self._point([t.to(self.dtype) for t in self.master.tensors])
        save_model(self.parts.model, self.source, directory)

    def describe(self) -> str:
        """See `Runtime.describe`."""
        n, layers = self.master.n_elements, len(self.parts.layers)
        cache = "no trunk cache"
        if self.trunk:
            kind = "scored positions only" if self.trunk.keep_kv else f"layers {self.parts.first} to {layers - 1}"
            cache = f"trunk cache on {self.trunk.storage} ({self.trunk.nbytes / 2**20:.0f} MiB; runs {kind})"
            if self.trunk.full:
                cache += "; it is full and computes rows again: raise --trunk-cache-bytes"
        what = "LoRA parameters"
        if self.parts.prefix:
            what = f"parameters of a prefix of {self.parts.prefix.tokens} tokens"
        elif self.whole:
            what = "parameters, all of the model's"
        return f"{n:,} {what}, {self.dtype} base on {self.device}, {cache}"

    def close(self) -> None:
        """See `Runtime.close`."""

    @contextmanager
    def _timed(self, part: str):
        began = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - began

    def _use(self, copy: ParamLayout) -> list[torch.Tensor]:
        self._point(copy.tensors)
        return [p.data for p in self.params]

    def _point(self, tensors: Sequence[torch.Tensor]) -> None:
        for p, tensor in zip(self.params, tensors, strict=True):
            p.data = tensor

    def _forward(self, split, indices, count: TokenCount, signs: int) -> Callable[[], torch.Tensor]:
        """Gather a batch and count its tokens; each call of the result scores it with the weights then in use."""
        rows = [row for i in indices for row in self.rows[split][i]]
        batch = RowBatch.of(rows, self.pad, self.device)
        examples = [self.examples[split][i] for i in indices]
        n_layers, first = len(self.parts.layers), self.parts.first
        tokens = sum(len(row.ids) for row in rows)
        count.scored += signs * tokens
        hidden, filled = self._hidden(split, indices, batch)
        if self.trunk is None:
            count.computed += signs * tokens
        else:
            run = int(batch.valid.sum()) if self.trunk.keep_kv else tokens
            count.computed += signs * run * (n_layers - first) / n_layers + self._trunk_share(filled)
        return lambda: option_scores(examples, self._log_probs(hidden(), batch.targets), batch.valid.cpu())

    def _hidden(self, split, indices, batch: RowBatch) -> tuple[Callable[[], torch.Tensor], int]:
        """A function that gives the hidden states at the scored positions, and the tokens whose trunk was run."""
        starts = self.first_row[split]
        numbers = [n for i in indices for n in range(starts[i], starts[i] + len(self.rows[split][i]))]
        if self.device.type != "cpu" or (self.trunk and self.trunk.keep_kv):
            return self._run_of(split, numbers, batch)
        parts = by_length(batch.lengths.tolist(), CALL)
        runs, filled = zip(
            *(self._run_of(split, [numbers[n] for n in own], batch.part(own)) for own in parts), strict=True
        )
        back = torch.tensor([n for own in parts for n in own]).argsort()
        return lambda: torch.cat([run() for run in runs])[back], sum(filled)

    def _run_of(self, split: str, numbers: Sequence[int], batch: RowBatch) -> tuple[Callable[[], torch.Tensor], int]:
        if self.trunk is None:
            return lambda: self._full_hidden(batch), 0
        return self.trunk.hidden(split, numbers, batch)

    def _trunk_share(self, tokens: int) -> float:
        """Work of filling the cache, in tokens through the whole model; keys and values count as one layer."""
        return tokens * (self.parts.first + self.trunk.keep_kv) / len(self.parts.layers)

    def _full_hidden(self, batch: RowBatch) -> torch.Tensor:
        mask, prefix = None if self.parts.causal else batch.mask, self.parts.prefix
        others = {"attention_mask": mask, **no_cache(self.parts.causal)}
        out = self.parts.body(input_ids=batch.ids, **prefix.inputs(len(batch.ids), mask) if prefix else others)
        return scored(out.last_hidden_state, batch.positions)

    def _log_probs(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """log p of the targets, float64 (rows, scored, candidates); up to a constant a position if not `vocabulary`."""
        tokens, inverse = targets.unique(return_inverse=True)
        few = None if self.vocabulary else head_logits(self.parts.head, hidden, tokens)
        if few is not None:
            return few.gather(-1, inverse).double().cpu()
        logits = self.parts.head(hidden).float()
        log_z = logits.double().logsumexp(-1, keepdim=True) if self.vocabulary else 0.0
        return (logits.gather(-1, targets).double() - log_z).cpu()

    def _trunk(self) -> Trunk:
        parts, choice = self.parts, self.options.trunk_cache
        on_device = choice == "device" or (choice == "auto" and self.device.type != "cpu")
        return Trunk(
            parts.body,
            parts.layers,
            parts.first,
            keep_kv=parts.kv_free and not (parts.window and parts.window < self._longest()),
            causal=parts.causal,
            pad=self.pad,
            device=self.device,
            storage=self.device if on_device else torch.device("cpu"),
            limit=self.options.trunk_cache_bytes,
        )

    @torch.no_grad()
    def _prove(self, flag: str, remedy: str) -> None:
        """Compare scores with the model's own forward pass on the longest rows, at a theta that changes them."""
        split, indices = self._hardest()
        rows = [row for i in indices for row in self.rows[split][i]]
        batch = RowBatch.of(rows, self.pad, self.device)
        # kept under one theta, used under another, as in training
        self._point_at_noise(seed=0)
        run = self._hidden(split, indices, batch)[0]
        self._point_at_noise(seed=1)
        expected = reference_log_probs(self.parts.model, batch)
        vocabulary, self.vocabulary = self.vocabulary, True
        got = self._log_probs(run(), batch.targets)
        self.vocabulary, allowed = vocabulary, PROOF_TOLERANCE
        if self.dtype != torch.float32:
            sizes = {1, 2, 3} & set(range(len(rows)))
            noise = max((self._batch_noise(rows, expected, size) for size in sizes), default=0.0)
            allowed = max(noise, 1e-6)
        worst = float((got - expected).abs().masked_fill(~batch.valid[:, :, None].cpu(), 0).max())
        if not worst <= allowed:
            raise UserError(
                f"{flag}: option log-probabilities are not exact on this model, they differ by {worst:.2g} from its"
                f" full forward pass (allowed {allowed:.2g}); {remedy}"
            )

    def _hardest(self) -> tuple[str, list[int]]:
        """The split with the longest row, and its longest and first examples."""
        length = lambda split, i: max(len(row.ids) for row in self.rows[split][i])  # noqa: E731
        longest = {split: max(range(len(own)), key=lambda i: length(split, i)) for split, own in self.rows.items()}
        split = max(longest, key=lambda split: length(split, longest[split]))
        return split, sorted({longest[split], *range(min(PROOF_EXAMPLES, len(self.rows[split])))})

    def _point_at_noise(self, seed: int) -> None:
        if self.whole:
            self.perturbed.perturb(Step([seed], PROOF_NOISE))
            self._use(self.plus)
            return
        noise = {name: lora_init(seed, name, shape) for name, shape in self.spec.shapes.items()}
        if self.parts.prefix:
            noise = self.initial_theta(seed)
        self._point([tensor.to(self.device, self.dtype) for tensor in noise.values()])

    def _batch_noise(self, rows, expected: torch.Tensor, size: int) -> float:
        """How far the full forward pass moves when the same rows are run `size` at a time."""
        worst = 0.0
        for start in range(0, len(rows), size):
            part = RowBatch.of(rows[start : start + size], self.pad, self.device)
            got, at = reference_log_probs(self.parts.model, part), part.valid[:, :, None].cpu()
            want = expected[start : start + size, : got.shape[1], : got.shape[2]]
            worst = max(worst, float((got - want).abs().masked_fill(~at, 0).max()))
        return worst


def _starts(rows: list[list]) -> list[int]:
    return [0, *itertools.accumulate(map(len, rows))][:-1]


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device must be cpu, cuda or cuda:N, got {name}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch sees no GPU here; use --device cpu")
    return device


def _check_backend(backend: str | None, device: torch.device) -> None:
    available = available_backends(device)
    if backend is not None and backend not in available:
        raise UserError(f"--backend {backend} does not run on {device}; available there: {', '.join(available)}")


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, name)
