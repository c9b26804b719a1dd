"""MeZO inside an SGLang scheduler process: one tensor-parallel rank's shard of theta, and the adapter slots it writes.

The trainer reaches it by the engine's own collective RPC, with scalars alone. Theta is never sent: each rank applies
the same seeds and coefficients to its shard, and writes both signs straight into the engine's adapter pool.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sglang.srt.managers.io_struct import RpcReqInput, RpcReqOutput

from mezo.atomic import replacing
from mezo.method.rules.logged import LoggedRule
from mezo.method.step import Step, Update
from mezo.models.families import family_of, why_kv_depends
from mezo.models.spec import CORE, adapter_shapes
from mezo.runtimes.sglang.inside import linear
from mezo.runtimes.sglang.inside.handshake import ENDED, METHOD, scratch_directory
from mezo.runtimes.sglang.inside.shards import Shard, Whole, shard_of
from mezo.runtimes.theta import PerturbedTheta
from mezo_kernels import ParamLayout, ParamSlot

if TYPE_CHECKING:
    from sglang.srt.lora.mem_pool import LoRAMemoryPool
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)
DERIVES = "on_lora_slots_updated"  # method of such a module (0.5.23: Inkling's)


@dataclass
class Seen:
    """What the hooks saw in this process: requests and loads of adapter slots by LoRA id, forward passes that began
    requests by the set of ids in them, ids that share KV, and ids of the trainer's own slots."""

    requests: Counter = field(default_factory=Counter)
    passes: Counter = field(default_factory=Counter)
    loads: Counter = field(default_factory=Counter)
    shared: set[str] = field(default_factory=set)
    own: set[str] = field(default_factory=set)


seen = Seen()


def see_request(result: None, req: "Req", *args, **kwargs) -> None:
    """After `Req.__init__`: count the request, and let adapters that change no key or value share one namespace."""
    seen.requests[req.lora_id] += 1
    if req.lora_id in seen.shared:
        req.extra_key = req.extra_key[: -len(req.lora_id)] or None


def see_pass(result: object, scheduler: "Scheduler", batch: "ScheduleBatch", *args, **kwargs) -> None:
    """After `Scheduler.run_batch`: count a forward pass that computes prompts, by the adapters in it.

    Args:
        result: what it returned.
        scheduler: whose method it is.
        batch: the requests.
        args, kwargs: its other arguments.
    """
    if batch.forward_mode.is_extend():
        seen.passes[frozenset(req.lora_id for req in batch.reqs)] += 1


def see_load(result: None, pool: "LoRAMemoryPool", uid: str | None, *args, **kwargs) -> None:
    """After `LoRAMemoryPool.load_lora_weight_to_buffer`: a slot of ours must be loaded once and never again.

    Args:
        result: what it returned.
        pool: whose method it is.
        uid: LoRA id of the adapter, None of the base model.
        args, kwargs: its other arguments.
    """
    seen.loads[uid] += 1


def answer(original: Callable, scheduler: "Scheduler", request: RpcReqInput) -> RpcReqOutput:
    """Around `Scheduler.handle_rpc_request`: run one of our methods on every rank and tell how each of them fared.

    Args:
        original: the method, for requests that are not ours.
        scheduler: of this rank.
        request: names a method of `Worker`, after METHOD, and its parameters.
    """
    if not request.method.startswith(METHOD):
        return original(scheduler, request)
    worker = scheduler.__dict__.get("mezo") or scheduler.__dict__.setdefault("mezo", Worker(scheduler))
    try:
        mine = {"value": getattr(worker, request.method.removeprefix(METHOD))(**(request.parameters or {}))}
    except Exception as error:
        logger.exception("%s failed", request.method)
        mine = {"error": f"{type(error).__name__}: {error}"}
    answers = worker.gather(mine)
    failed = [f"rank {rank}: {a['error']}" for rank, a in enumerate(answers) if "error" in a]
    text = "; ".join(failed) if failed else json.dumps([a["value"] for a in answers])
    return RpcReqOutput(success=not failed, message=text)


class Worker:
    """One rank's part. Public methods are called by RPC, with scalars, on all ranks, between forward passes."""

    def __init__(self, scheduler: "Scheduler"):
        self.scheduler, self.group = scheduler, scheduler.tp_group
        self.rank, self.size = self.group.rank_in_group, self.group.world_size
        self.manager = scheduler.tp_worker.model_runner.lora_manager
        self.ids: dict[str, str] = {}
        self.served: dict[str, str] = {}

    def gather(self, value: object) -> list:
        """The value of every rank, in order."""
        return [value] if self.size == 1 else self.group.all_gather_object(value)

    def setup(
        self,
        shapes: str,
        pairs: int,
        share: bool,
        backend: str | None,
        rule: str,
        frozen: str = "{}",
        packed: bool = False,
    ) -> dict:
        """Take the slots plus0, minus0, plus1, ... and lay the canonical parameters over them.

        Args:
            shapes: JSON, full shape of each trained parameter by canonical name.
            pairs: perturbations held at once.
            share: all slots use one cache namespace; refused if a trained parameter changes a key or value.
            backend: of the fused ops; None by device.
            rule: JSON, the `LoggedRule` as a log's header holds it.
            frozen: JSON, full shape of each tensor of the adapter that is not trained.
            packed: the weights of frozen linear layers are packed for oneDNN.
        Returns:
            Elements of this rank's shard, dtype of the slots and the place of each, the reason why keys and values
            depend on theta, and bytes of packed weights.
        """
        shapes, frozen = ({n: tuple(shape) for n, shape in json.loads(text).items()} for text in (shapes, frozen))
        base = self.manager.base_hf_config
        reason = why_kv_depends(shapes, base.num_hidden_layers, family_of(base))
        if share and reason:
            raise ValueError(f"the adapters may not share a cache: {reason}")
        self.ids, self.served = self._ids(f"{sign}{k}" for k in range(pairs) for sign in ("plus", "minus")), {}
        ids = list(self.ids.values())
        for number in range(len(ids)):  # a slot at a time: they lie in the order of a step's requests, see lora.py
            self.manager.fetch_new_loras(set(ids[: number + 1]))
        refuse_derived(self.manager.lora_modules)
        pool = self.manager.memory_pool
        self.slots = {name: pool.uid_to_buffer_id[lora_id] for name, lora_id in self.ids.items()}
        seen.own = set(self.ids.values())
        seen.shared = set(seen.own) if share else set()
        seen.loads.clear()
        seen.requests.clear()
        seen.passes.clear()
        adapter = adapter_shapes(shapes, frozen)
        self.shards = {name: shard_of(self.manager, name, shape) for name, shape in adapter.items()}
        self.trained = {name: self.shards.get(name) or Whole(shape) for name, shape in shapes.items()}
        self.frozen = {name: torch.zeros_like(self._view(name, "plus0"), dtype=torch.float32) for name in frozen}
        self.theta = self._layouts(pairs, backend, LoggedRule.of_header({"rule": json.loads(rule)}))
        self.copies = dict(zip(self.ids, (copy for pair in self.theta.pairs for copy in pair), strict=True))
        self._skip_unadapted()
        nbytes = linear.pack(self.scheduler.tp_worker.model_runner.model, packed)
        return {
            "elements": self.theta.master.n_elements,
            "dtype": str(pool.dtype),
            "places": list(self.slots.values()),
            "kv_depends": reason,
            "packed": nbytes,
        }

    def _ids(self, names: Iterable[str]) -> dict[str, str]:
        known = {ref.lora_name: lora_id for lora_id, ref in self.manager.lora_refs.items()}
        return {name: known[name] for name in names}

    def serve(self, slots: str) -> dict:
        """After `setup`: take further slots, for requests that are not the trainer's; so are those of the base now.

        Args:
            slots: JSON, names of the slots.
        """
        self.served = self._ids(json.loads(slots))
        self.manager.fetch_new_loras({*self.ids.values(), *self.served.values()})
        pool = self.manager.memory_pool
        self.slots |= {name: pool.uid_to_buffer_id[lora_id] for name, lora_id in self.served.items()}
        if seen.shared:
            seen.shared |= set(self.served.values())
        seen.loads.clear()
        return {}

    def place(self, slot: str, path: str) -> dict:
        """Write an adapter to a slot of `serve`, unless a request still uses that slot.

        Args:
            slot: its name.
            path: safetensors file of the whole adapter, float32, that rank 0 can read.
        Returns:
            Whether it was written.
        """
        self._check_slots()
        if any(req.lora_id == self.served[slot] for req in self._in_flight()):
            return {"placed": False}
        full = self._broadcast(path)
        for name, shard in self.shards.items():
            self._view(name, slot).copy_(shard.block(full[name]))
        return {"placed": True}

    def _layouts(self, pairs: int, backend: str | None, rule: LoggedRule) -> PerturbedTheta:
        views = {slot: [self._copy(name, slot) for name in self.trained] for slot in self.ids}
        zeros = [
            torch.zeros_like(t, dtype=torch.float32, memory_format=torch.contiguous_format) for t in views["plus0"]
        ]
        items = zip(self.trained.items(), zeros, strict=True)
        master = ParamLayout(ParamSlot(n, t, s.full_shape, s.row_start, s.col_start) for (n, s), t in items)
        copies = [(master.like(views[f"plus{k}"]), master.like(views[f"minus{k}"])) for k in range(pairs)]
        return PerturbedTheta(master, copies, backend, rule)

    def _view(self, name: str, slot: str) -> torch.Tensor:
        """Storage of a tensor of the adapter in a slot."""
        return self.shards[name].view(self.manager.memory_pool, self.slots[slot])

    def _copy(self, name: str, slot: str) -> torch.Tensor:
        """Where a perturbed copy of a parameter is written: in the slot, or beside it for `_show_products`."""
        if name in self.shards:
            return self._view(name, slot)
        return torch.zeros(self.trained[name].full_shape, device=self._device)

    @property
    def _device(self) -> torch.device:
        return self._view(next(iter(self.shards)), "plus0").device

    def _show_products(self, slots: Iterable[str] | None = None) -> None:
        """Write lora_B = B R of the copies of R to the slots; nothing to do where no R is trained."""
        for slot in self.ids if slots is None else slots:
            for name, product in self._products(slot):
                self._view(name, slot).copy_(product)

    def _products(self, slot: str) -> Iterator[tuple[str, torch.Tensor]]:
        """(name of lora_B, this rank's rows of B R rounded once) of a slot, for each R that is trained."""
        copy = self.copies[slot]
        for name, core in zip(copy.names, copy.tensors, strict=True):
            if name.endswith(CORE):
                name = f"{name.removesuffix(CORE)}lora_B.weight"
                yield name, (self.frozen[name] @ core).to(self._view(name, slot).dtype)

    def _skip_unadapted(self) -> None:
        """Modules that no trained parameter adapts take the base path: their slots hold zeros."""
        used = {shard.module for shard in self.shards.values()}
        for modules in self.manager.lora_modules:
            for name, module in modules.items():
                module.set_lora = module.set_lora and name in used

    def load(self, path: str) -> dict:
        """Set this rank's shard of theta from a safetensors file of full float32 tensors that rank 0 can read."""
        full = self._broadcast(path)
        for name, tensor in zip(self.theta.master.names, self.theta.master.tensors, strict=True):
            tensor.copy_(self.trained[name].block(full[name]))
        for name, tensor in self.frozen.items():
            if name in full:
                tensor.copy_(self.shards[name].block(full[name]))
                for slot in self.ids if name.endswith("lora_A.weight") else ():
                    self._view(name, slot).copy_(tensor)
        self.theta.forget()
        return {}

    def _broadcast(self, path: str) -> dict[str, torch.Tensor]:
        """The tensors of a file that rank 0 can read, on every rank."""
        full = self.group.broadcast_object(_read(path) if self.rank == 0 else None)
        if isinstance(full, str):
            raise ValueError(full)
        return full

    def save(self, path: str) -> dict:
        """Rank 0 writes theta, whole, to a safetensors file; a factor that several ranks hold must be equal on all."""
        names = self.theta.master.names
        blocks = {n: (self.trained[n], t.cpu()) for n, t in zip(names, self.theta.master.tensors, strict=True)}
        parts = self.gather(blocks)
        if self.rank == 0:
            full = {name: _join(name, [part[name] for part in parts]) for name in names}
            with replacing(Path(path)) as part:
                save_file(full, part)
        return {}

    def update(self, message: str, watch: bool) -> dict:
        """See `PerturbedTheta.update`.

        Args:
            message: JSON, fields of each `Update` under "updates", and those of the next `Step`, or null, under "then".
            watch: keep what `verify` needs.
        Returns:
            Seconds in the fused op, and `report`.
        """
        self._check()
        device = self.theta.master.device
        _wait(device)
        began = time.perf_counter()
        values = json.loads(message)
        then = None if values["then"] is None else Step(**values["then"])
        self.theta.update([Update(**fields) for fields in values["updates"]], then, watch=watch)
        if then is not None:
            self._show_products(list(self.ids)[: 2 * len(then)])
        _wait(device)
        return {"seconds": time.perf_counter() - began, **self.report()}

    def show(self, what: str) -> dict:
        """Write "theta" to plus0, "equal" theta to all slots, or the "perturbed" copies of the last step."""
        self._check()
        copies = [copy for pair in self.theta.pairs for copy in pair]
        if what == "perturbed":
            self.theta.restore()
        else:
            self.theta.show(copies[:1] if what == "theta" else copies)
        self._show_products()
        return self.report()

    def flush(self) -> dict:
        """Forget all cached keys and values; the engine does so only once it has tidied up after its last batch."""
        self._check()
        return {"flushed": bool(self.scheduler.flush_cache(empty_cache=False))}

    def verify(self) -> dict:
        """What the watched step wrote, compared with the reference: the first difference on this rank, or None."""
        self._check()
        differs = lambda slot: (n for n, p in self._products(slot) if not torch.equal(self._view(n, slot), p))  # noqa: E731
        wrong = next((f"{name} of {slot} is not B R" for slot in self.ids for name in differs(slot)), None)
        return {"difference": wrong or self.theta.verify()}

    def end(self) -> dict:
        """Tell the machines that only wait for it that the trainer has done with the engine."""
        (scratch_directory() / ENDED).touch()
        return {}

    def report(self) -> dict:
        """What the trainer had computed since the last report.

        Returns:
            Requests by slot, those of no slot of ours under "other", and forward passes that computed their prompts.
        """
        names, users = {lora_id: name for name, lora_id in self.ids.items()}, self._users()
        counts = Counter()
        for lora_id, n in seen.requests.items():
            if lora_id not in users:
                counts[names.get(lora_id, "other")] += n
        passes = sum(n for ids, n in seen.passes.items() if ids - users)
        seen.requests.clear()
        seen.passes.clear()
        self._check()
        return {"requests": counts, "passes": passes}

    def _users(self) -> set[str | None]:
        """LoRA ids of requests that are not the trainer's; None is the base."""
        return {*self.served.values(), None} if self.served else set()

    def _in_flight(self) -> "list[Req]":
        """Requests that are not answered yet."""
        busy, last = self.scheduler, self.scheduler.last_batch
        # a batch that has just been answered is still the last one until the engine's loop comes round again
        requests = [*busy.waiting_queue, *busy.running_batch.reqs, *(last.reqs if last is not None else ())]
        requests += [busy.chunked_req] if busy.chunked_req is not None else []
        return [req for req in requests if not req.finished()]

    def _check(self) -> None:
        """The slots are where they were, hold what we wrote, and nothing of the trainer's is reading them."""
        users = self._users()
        if any(req.lora_id not in users for req in self._in_flight()):
            raise RuntimeError("the engine still has requests in flight")
        self._check_slots()

    def _check_slots(self) -> None:
        pool = self.manager.memory_pool
        for name, lora_id in (self.ids | self.served).items():
            if seen.loads[lora_id] or pool.uid_to_buffer_id.get(lora_id) != self.slots[name]:
                raise RuntimeError(f"adapter slot {name} was evicted by the engine: what was trained in it is gone")


def refuse_derived(layers: Iterable[Mapping[str, torch.nn.Module]]) -> None:
    """Raise ValueError if a module keeps weights that it derives from adapter slots when the engine loads these.

    Args:
        layers: of the engine's LoRA manager, its modules by name, a layer each.
    """
    derived = {type(m).__name__ for modules in layers for m in modules.values() if hasattr(m, DERIVES)}
    if derived:
        raise ValueError(
            f"{', '.join(sorted(derived))} derives weights from an adapter when it is loaded, and would not see what is"
            " written to it later: use --runtime hf"
        )


def _read(path: str) -> dict[str, torch.Tensor] | str:
    """The tensors of a file, or why there are none: the ranks that wait for them must hear it."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        return f"{path}: {error}"


def _join(name: str, parts: list[tuple[Shard | Whole, torch.Tensor]]) -> torch.Tensor:
    """The full tensor from the ranks' blocks."""
    full = torch.full(parts[0][0].full_shape, torch.nan)
    for rank, (shard, tensor) in enumerate(parts):
        block = shard.block(full)
        if not (block.isnan().all() or torch.equal(block, tensor)):
            raise RuntimeError(f"{name} of rank {rank} differs from that of another rank that holds the same elements")
        block.copy_(tensor)
    if full.isnan().any() and not any(tensor.isnan().any() for _, tensor in parts):
        raise RuntimeError(f"no rank holds some of the elements of {name}")
    return full


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
