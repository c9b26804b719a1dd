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
from mezo.method.sampling import Sampling, likeliest
from mezo.method.step import Step, Update
from mezo.models.full import save_model
from mezo.models.linear import Product, add_adapters_in_place, choose, pack, run_by_onednn, tell, why_not_by, width_of
from mezo.models.load import Checkpoint
from mezo.models.lora import as_peft_loads
from mezo.models.parts import load_parts
from mezo.models.quantization import library_of
from mezo.models.spec import NONE
from mezo.runtimes.allocator import keep_freed_memory
from mezo.runtimes.base import TokenCount
from mezo.runtimes.calibration import calibrate
from mezo.runtimes.generation import Writing, decoder_of, written, written_by_decoder
from mezo.runtimes.hf.rowwise import RowWise, why_not
from mezo.runtimes.hf.scorer import Scorer
from mezo.runtimes.reference import another_function, reference_log_probs
from mezo.runtimes.sides import Sides
from mezo.runtimes.theta import PerturbedTheta
from mezo_kernels import ParamLayout, available_backends

SIGNS = ("plus", "minus")
WATCHED = 1 << 20  # elements of a whole model that a watched step compares with the reference


class HFRuntime:
    """transformers + PEFT on one device; implements all that `mezo.runtimes.base` has but `Follower`.

    The float32 master and the two perturbed copies lie beside the model; a copy is put to use by pointing the
    trained parameters at it, so nothing is copied and nothing is ever restored by arithmetic. Where the base itself
    is trained nothing else is left of it: 12 bytes a parameter in float32, 8 in 16 bits.

    With --directions the copies of as many perturbations as fit --copies-bytes lie there, and one forward pass runs
    all rows at both signs of all of them (`rowwise.py`). Where the model cannot, a forward pass runs each.

    Args:
        model: which, and what is trained of it.
        machine: where it runs, with options of this runtime.
        work: what the run asks for.
        pad: token id to pad with.
        checkpoint: of the model, if its configuration has been read.
    Raises:
        UserError: no such device or backend, or the model cannot be loaded or trained so.
    """

    def __init__(
        self, model: Model, machine: Machine, work: Workload, pad: int = 0, checkpoint: Checkpoint | None = None
    ):
        self.device = _device(machine.device)
        self.dtype = _dtype(model.dtype, self.device)
        self.backend = None if machine.backend == "auto" else machine.backend
        _check_backend(self.backend, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        checkpoint = checkpoint or Checkpoint.of(
            model.base, model.tuning.head, model.quantization, model.trust_remote_code
        )
        self.parts, self.spec = load_parts(model, self.device, self.dtype, work.classes, checkpoint)
        self.tokens, self.eval_tokens = TokenCount(), TokenCount()
        self.pad, self.work, self.source = self._padding(pad), work, model.base
        self.options: HF = machine.runtime
        self.params = list(self.parts.params.values())
        self.linear = self._with_product(product_of(model, machine, checkpoint))
        self.whole, self.calibrated = self.spec.peft is None, self.parts.attached.calibration is None
        start = [p.data.float() if self.whole else torch.zeros_like(p, dtype=torch.float32) for p in self.params]
        self.master = ParamLayout(dict(zip(self.spec.shapes, start, strict=True)))
        self.pairs = self._pairs_held()
        pairs, rowwise = self._allocate(by_row=work.directions > 1 and why_not(self.parts) is None)
        self.plus, self.minus = pairs[0]
        named = ((f"{sign}{k}", copy) for k, pair in enumerate(pairs) for sign, copy in zip(SIGNS, pair, strict=True))
        self.copies, self.held = dict(named), self.pairs
        rule = work.rule
        rule.check_patterns(self.master.names)
        watched = WATCHED if self.whole else None
        self.perturbed = PerturbedTheta(self.master, pairs, self.backend, rule, watched)
        self.sides = Sides(rule.rule.one_sided, rule.rule.guides)
        self.seconds = dict.fromkeys(("kernels", "forward"), 0.0)
        self.writing = Writing.of(checkpoint) if work.max_new_tokens else None
        self.decoder = decoder_of(checkpoint) if self.parts.encoder_decoder else None
        if self.writing and not (self.parts.causal or self.decoder):
            raise UserError(f"--model {model.base} fills masks and generates no text: use another model")
        self.scorer = Scorer(self.parts, self.options, work, pad, self.dtype, self.decoder, rowwise)

    def _padding(self, pad: int) -> int:
        """Token id to pad with: a classifier that reads the last token of a row tells it from padding by its number."""
        config = self.parts.base.config.get_text_config()
        if self.parts.scored_by != "classification":
            return pad
        if config.pad_token_id is None:
            config.pad_token_id = pad
        return config.pad_token_id

    def _with_product(self, product: Product) -> str:
        """Have the weights multiplied so; return the product's name."""
        nbytes = pack(self.parts.body, set(map(id, self.params))) if product.name == "packed" else 0
        if product.name == "packed" and not nbytes:
            product = Product("torch", "products are torch's own: this model has linear layers of its own making")
        if product.name != "torch" and why_not_by("onednn", self.dtype, self.device) is None:
            run_by_onednn(self.parts.model)  # what is not packed: the head, or all
        if self.spec.peft is not None:
            add_adapters_in_place(self.parts.model)
        if self.device.type == "cpu":
            tell(product, nbytes)
        return product.name

    def _allocate(self, by_row: bool) -> tuple[list[tuple[ParamLayout, ParamLayout]], RowWise | None]:
        """Room for the perturbed copies, (plus, minus) of each pair; `by_row`: where a `RowWise` finds them."""
        zeros = lambda p, *copies: torch.zeros(*copies, *p.shape, dtype=self.dtype, device=self.device)  # noqa: E731
        rowwise = None
        if not by_row:
            copies = [self.master.like([zeros(p) for p in self.params]) for _ in range(2 * self.pairs)]
        else:
            stacks = [zeros(p, 2 * self.pairs) for p in self.params]
            rowwise = RowWise(self.parts, stacks)
            copies = [self.master.like(list(copy)) for copy in zip(*stacks, strict=True)]
        return list(zip(copies[: self.pairs], copies[self.pairs :], strict=True)), rowwise

    def _pairs_held(self) -> int:
        """Perturbations whose copies are held at once: one where they are scored one after the other anyway."""
        if self.work.directions == 1 or why_not(self.parts):
            return 1
        fit = self.options.copies_bytes // (2 * self.dtype.itemsize * self.master.n_elements)
        return max(1, min(fit, self.work.perturbations))

    def prepare(self, splits: dict[str, Sequence[Example]], adapter: str = "") -> None:
        """See `Runtime.prepare`. Raises UserError if a trunk cache that was asked for is not exact on this model."""
        self.adapter = adapter
        self.scorer.prepare(splits, self._use_copy)
        for split, work in self.scorer.fill().items():
            (self.tokens if split == "train" else self.eval_tokens).computed += work

    def refuse_further(self, examples: Sequence[Example]) -> None:
        """See `Grows.refuse_further`."""
        self.scorer.refuse_further(examples)

    def grow(self, split: str, examples: Sequence[Example]) -> None:
        """See `Grows.grow`."""
        self.scorer.grow(split, examples)

    @property
    def seconds_filling(self) -> float:
        """Time spent filling the trunk cache so far."""
        return self.scorer.trunk.seconds if self.scorer.trunk else 0.0

    @property
    def seconds_proving(self) -> float:
        """Time that the proof at the start took."""
        return self.scorer.seconds_proving

    @property
    def tokens_filled(self) -> int:
        """Tokens that the trunk cache was filled with so far."""
        return self.scorer.trunk.tokens if self.scorer.trunk else 0

    def load(self, theta: dict[str, torch.Tensor]) -> None:
        """See `Runtime.load`."""
        for name, tensor in zip(self.master.names, self.master.tensors, strict=True):
            tensor.copy_(theta[name])
        for name, p in self.parts.attached.frozen.items():
            if name in theta:
                p.data.copy_(theta[name])
        self.perturbed.forget()
        self.sides.loaded()

    def initial_theta(self, run_seed: int) -> dict[str, torch.Tensor]:
        """See `InitialTheta.initial_theta`."""
        if not self.calibrated:
            self._point([torch.zeros_like(p) for p in self.params])
            calibrate(self.parts, self.scorer.rows.get("train", ()), self.pad)
            self.calibrated = True
        return self.parts.attached.initial(run_seed)

    def theta(self) -> dict[str, torch.Tensor]:
        """See `Runtime.theta`."""
        tensors = (t.detach().to("cpu", copy=True) for t in self.master.tensors)
        return dict(zip(self.master.names, tensors, strict=True))

    def update(self, updates: Sequence[Update], then: Step | None = None, *, watch: bool = False) -> None:
        """See `Runtime.update`: one fused pass."""
        with self._timed("kernels"):
            self.perturbed.update(updates, then, watch=watch)
        self.held = len(then or ())
        self.sides.written(theta_changed=bool(updates), along=bool(then and then.weights))

    def perturb(self, step: Step, *, watch: bool = False) -> None:
        """See `Runtime.perturb`."""
        self.update([], step, watch=watch)

    def equalise(self) -> None:
        """See `Runtime.equalise`."""
        self.perturbed.show([self.plus, self.minus])
        self.sides.equalised()
        self.held = 1

    def verify(self) -> str | None:
        """See `Runtime.verify`: what is compared is what the model's parameters point at."""
        used = [self.copies[f"{sign}{k}"] for k in range(self.held) for sign in SIGNS]
        return self.perturbed.verify([self._use(copy) for copy in used])

    @torch.no_grad()
    def score_pairs(
        self, split: str, indices: Sequence[int], shares: Sequence[Sequence[int]] | None = None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """See `Runtime.score_pairs`. Both signs run on the same gathered batch."""

        def read(names: list[str]) -> list[torch.Tensor]:
            return self._with_each(names, self.scorer.forward(split, indices, self.tokens, signs=len(names)))

        with self._timed("forward"):
            if shares is None:
                return self.sides.pairs(self.held, ("scores", split, *indices), read)
            batches = [[indices[i] for i in share] for share in shares]
            if self.scorer.rowwise:
                return self._pairs_at_once(batches, lambda all_, copies: self._scores(split, all_, copies))
            return [
                self._pair(k, batch, lambda b: self.scorer.forward(split, b, self.tokens, signs=1)())
                for k, batch in enumerate(batches)
            ]

    def _pairs_at_once(self, batches: Sequence[Sequence[int]], run: Callable) -> list[tuple]:
        """What one pass gives for batch k at plus k and at minus k, for all k.

        Args:
            batches: numbers of examples, one batch a perturbation.
            run: from numbers of examples and the copy of each, results in order.
        """
        flat = [i for batch in batches for i in batch]
        owners = [k for k, batch in enumerate(batches) for _ in batch]
        results = run(flat * 2, [*owners, *(self.pairs + k for k in owners)])
        ends = list(itertools.accumulate(map(len, batches)))
        spans = [slice(end - len(batch), end) for end, batch in zip(ends, batches, strict=True)]
        plus, minus = results[: len(flat)], results[len(flat) :]
        return [(plus[span], minus[span]) for span in spans]

    def _pair(self, k: int, batch: Sequence[int], run: Callable) -> tuple:
        """What `run` returns of a batch, which may be empty, at plus k and at minus k."""
        if not batch:
            return [], []
        return tuple(self._with_each([f"{sign}{k}" for sign in SIGNS], lambda: run(batch)))

    def _scores(self, split: str, indices: Sequence[int], copies: Sequence[int]) -> torch.Tensor:
        """Option scores of examples, each at a copy of its own."""
        of_rows = [copy for i, copy in zip(indices, copies, strict=True) for _ in self.scorer.rows[split][i]]
        return self.scorer.forward(split, indices, self.tokens, signs=1, copies=of_rows)()

    @torch.no_grad()
    def score(self, split: str, indices: Sequence[int]) -> torch.Tensor:
        """See `Runtime.score`. A 16-bit model sees theta rounded once."""
        self._point([t.to(self.dtype) for t in self.master.tensors])
        return self.scorer.forward(split, indices, self.eval_tokens, signs=1)()

    def generate(self, split: str, indices: Sequence[int], max_new_tokens: int, stop: Sequence[str]) -> list[str]:
        """See `Runtime.generate`. The trunk cache has no part in it: a text is new at every theta."""
        self._point([t.to(self.dtype) for t in self.master.tensors])
        return self._write(split, indices, max_new_tokens, stop, self.eval_tokens)

    def generate_pairs(
        self,
        split: str,
        indices: Sequence[int],
        max_new_tokens: int,
        stop: Sequence[str],
        shares: Sequence[Sequence[int]] | None = None,
        sampling: Sampling | None = None,
    ) -> list[tuple[list[str], list[str]]]:
        """See `Runtime.generate_pairs`."""
        write = lambda batch: self._write(split, batch, max_new_tokens, stop, self.tokens, sampling)  # noqa: E731
        read = lambda names: self._with_each(names, lambda: write(indices))  # noqa: E731
        with self._timed("forward"):
            if shares is None:
                return self.sides.pairs(self.held, ("texts", split, sampling, *indices), read)
            batches = [[indices[i] for i in share] for share in shares]
            if self.scorer.rowwise is None or self.parts.prefix:
                return [self._pair(k, batch, write) for k, batch in enumerate(batches)]

            def run(examples: Sequence[int], copies: Sequence[int]) -> list[str]:
                with self.scorer.rowwise.using(copies):
                    return write(examples)

            return self._pairs_at_once(batches, run)

    def _with_each(self, names: Sequence[str], run: Callable) -> list:
        """What `run` returns with each of these copies in use, in order."""
        results = []
        for name in names:
            self._use(self.copies[name])
            results.append(run())
        return results

    def _write(
        self,
        split: str,
        indices: Sequence[int],
        max_new_tokens: int,
        stop: Sequence[str],
        count: TokenCount,
        sampling: Sampling | None = None,
    ) -> list[str]:
        """Texts with the weights in use; a token of an answer is run to find the next, so the last one never is."""
        prompts = [self.scorer.examples[split][i].prompt for i in indices]
        ended = lambda ids: self.writing.ended(ids, stop)  # noqa: E731
        parts, pick = self.parts, likeliest if sampling is None else sampling.pick(indices)
        if self.decoder:
            answers = written_by_decoder(parts.base, self.decoder, prompts, max_new_tokens, ended, self.pad, pick)
        else:
            answers = written(parts.body, parts.logits, prompts, max_new_tokens, ended, self.pad, parts.prefix, pick)
        tokens = sum(len(prompt) + len(answer) - 1 for prompt, answer in zip(prompts, answers, strict=True))
        count.scored, count.computed = count.scored + tokens, count.computed + tokens
        return [self.writing.text(answer, stop) for answer in answers]

    def gradient(
        self, split: str, indices: Sequence[int], loss: Callable[[torch.Tensor], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """See `Differentiable.gradient`. A 16-bit model is differentiated where theta rounds to."""
        with torch.no_grad():
            forward = self.scorer.forward(split, indices, self.eval_tokens, signs=1)
        self._point([t.to(self.dtype) for t in self.master.tensors])
        for p in self.params:
            p.requires_grad_(True)
        try:
            grads = torch.autograd.grad(loss(forward()), self.params, materialize_grads=True)
        finally:
            self.parts.model.requires_grad_(False)
        return {name: g.float().cpu() for name, g in zip(self.master.names, grads, strict=True)}

    def save_model(self, directory: Path) -> None:
        """See `Savable.save_model`."""
        self._point([t.to(self.dtype) for t in self.master.tensors])
        save_model(self.parts.model, self.source, directory)

    def describe(self) -> str:
        """See `Runtime.describe`."""
        n, layers = self.master.n_elements, len(self.parts.layers)
        cache = "no trunk cache"
        if trunk := self.scorer.trunk:
            kind = "scored positions only" if trunk.keep_kv else f"layers {self.parts.first} to {layers - 1}"
            cache = f"trunk cache on {trunk.storage} ({trunk.nbytes / 2**20:.0f} MiB; runs {kind})"
            if trunk.full:
                cache += "; it is full and computes rows again: raise --trunk-cache-bytes"
        base = str(self.dtype) if self.spec.quantization == NONE else f"{self.dtype} {self.spec.quantization}"
        title = self.parts.attached.title
        return f"{n:,} {title}, {base} base on {self.device}, {cache}{self._describe_passes()}"

    def _describe_passes(self) -> str:
        """How the perturbations of a step share forward passes, where the batch is divided among directions."""
        if self.work.directions == 1:
            return ""
        if self.scorer.rowwise is None:
            return f"; {self.work.directions} directions, a forward pass each: {self.scorer.why_not_rowwise}"
        passes = -(-self.work.perturbations // self.pairs)
        held = f"{self.pairs} of {self.work.perturbations} perturbations" if passes > 1 else "all perturbations"
        return f"; {self.work.directions} directions, a forward pass holds {held} at both signs"

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

    @torch.no_grad()
    def prove_adapter(self) -> None:
        """See `Runtime.prove_adapter`."""
        if not self.adapter:
            return
        self._point([t.to(self.dtype) for t in self.master.tensors])
        proof = self.scorer.proof()
        log_probs = reference_log_probs(self.parts.model, proof.batch)
        with as_peft_loads(self.parts.model, self.adapter):
            why = proof.why_wrong(self.parts.model, log_probs)
        if why:
            raise another_function(self.adapter, why)

    def _use_copy(self, copy: int, seed: int | None = None) -> None:
        """See `scorer.Use`; what is written to has not been written to by a step yet."""
        layout = self.copies[f"{SIGNS[copy // self.pairs]}{copy % self.pairs}"]
        if seed is not None:
            theta = dict(zip(self.master.names, self.master.tensors, strict=True))
            for tensor, noise in zip(layout.tensors, self.parts.attached.noise(theta, seed), strict=True):
                tensor.copy_(noise)
        self._use(layout)


def product_of(model: Model, machine: Machine, checkpoint: Checkpoint) -> Product:
    """What multiplies by the frozen weights of a model here, as --linear says or a trial decides."""
    device, asked = _device(machine.device), machine.runtime.linear
    library = library_of(model.quantization, checkpoint.config)
    if library:
        if asked in ("onednn", "packed"):
            raise UserError(f"--linear {asked}: the weights are quantised, {library} multiplies by them; leave it out")
        return Product("torch", f"products of quantised weights: {library}'s")
    frozen = model.tuning.name != "full"
    return choose(asked, width_of(checkpoint.config), _dtype(model.dtype, device), device, frozen)


def has_product(name: str, model: Model, machine: Machine) -> bool:
    """Whether a model's products can be computed so here, see --linear."""
    device = _device(machine.device)
    unpacked = model.quantization == NONE
    return name == "torch" or (unpacked and why_not_by(name, _dtype(model.dtype, device), device) is None)


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
