"""The SGLang runtime of `mezo serve`: the trainer's requests give way to users, and versions of theta are put aside."""

import json
import threading
import time
from collections.abc import Callable, Sequence

import torch

from mezo.errors import RunError, UserError
from mezo.run.adapter import as_lora
from mezo.runtimes.base import TokenCount
from mezo.runtimes.sglang.answers import SCORE_ONLY
from mezo.runtimes.sglang.engine import EngineHandle, accelerated
from mezo.runtimes.sglang.runtime import SGLangRuntime
from mezo.serve.admission import Admission
from mezo.serve.engine import ServedEngine
from mezo.serve.versions import Versions

PATIENCE = 60.0  # seconds for the engine to be done with a slot that no request reads
PAUSE = 0.01


class ServingRuntime(SGLangRuntime):
    """`SGLangRuntime` whose engine users share; implements `Serves` too.

    Args:
        args: of `SGLangRuntime`.
        admission: who may use the engine.
        versions: how many versions of the adapter are held at once.
        user_tokens: keys and values kept for users' requests on a CPU, in tokens.
        engine_options: further arguments of the engine.

    Whoever knows the run sets `frozen`, what stays of the adapter; `replay`, which gives theta after a number of steps;
    and `promoted`, which is told each promotion, with its reason, before it takes effect.
    """

    shares = True

    def __init__(self, *args, admission: Admission, versions: int, user_tokens: int, engine_options: dict):
        super().__init__(*args)
        if self.options.get("nnodes", 1) > 1 or self.options.get("tokenizer_worker_num", 1) > 1:
            raise UserError("--engine-arg nnodes and tokenizer_worker_num must be 1 under mezo serve: leave them out")
        if "max_loras_per_batch" in self.options:
            raise UserError("--engine-arg max_loras_per_batch: mezo serve decides it: use --versions")
        self._names = [f"served{i}" for i in range(versions)]
        self.admission, self.versions = admission, Versions(self._names)
        self._user_tokens, self._engine_options = user_tokens, engine_options
        self._placing = threading.Lock()
        self.frozen: dict[str, torch.Tensor] = {}
        self.replay: Callable[[int], dict[str, torch.Tensor]]
        self.promoted: Callable[[int, str], None]
        self.seconds_placing = 0.0  # of the last version: replay and writing

    def _slots(self) -> list[str]:
        return super()._slots() + self._names

    def _started(self, arguments: dict) -> EngineHandle:
        """Users get room of their own, unless --engine-arg says how much there is in all."""
        more = {"max_total_tokens": self._user_tokens, "max_running_requests": 64} if not accelerated() else {}
        for name, extra in more.items():
            if name not in self.options:
                arguments[name] += extra
        return ServedEngine(arguments | self._engine_options, self._scratch)

    def _launch(self) -> None:
        super()._launch()
        self._call("serve", slots=json.dumps(self._names))

    def _generate(
        self,
        requests: Sequence[tuple[str, Sequence[int]]],
        count: TokenCount,
        sampling: dict | list[dict] = SCORE_ONLY,
        **wanted,
    ) -> list[dict]:
        """As there, in parts that are sent when users leave room for them."""
        # prompts that go ahead are computed whole, scored ones mostly found in the cache, texts written token by token
        kind = "texts" if isinstance(sampling, list) else "scores" if wanted else f"{sampling['max_new_tokens']} new"
        answers = []
        for part in self.admission.parts(len(requests), kind):
            of_part = {name: value[part] for name, value in wanted.items() if isinstance(value, list)}
            own = sampling[part] if isinstance(sampling, list) else sampling
            answers += super()._generate(requests[part], count, own, **wanted | of_part)
        return answers

    def _call(self, method: str, **parameters) -> list[dict]:
        """As there, when users leave room for it: the engine does nothing else meanwhile."""
        with self.admission.part(method):
            return super()._call(method, **parameters)

    def warm_up(self) -> None:
        """Have the engine write a few tokens: what it compiles for that is not waited for by a user."""
        for sampling in ({"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9, "top_k": 20}):
            names = [None, self._names[0]]
            prompts, sampling = (
                [[self._all_rows()[0].ids[0]]] * 2,
                {"max_new_tokens": 4, "ignore_eos": True, **sampling},
            )
            self.engine.generate(input_ids=prompts, lora_path=names, sampling_params=sampling, return_logprob=True)

    def promote(self, step: int) -> None:
        """See `Serves.promote`."""
        self._promote(step, self.theta, "dev")

    def promote_step(self, step: int, why: str) -> None:
        """Have users be answered by theta after so many steps, as the log gives it.

        Args:
            step: at most the steps that are in the log.
            why: see `Promotions`.
        """
        self._promote(step, lambda: self.replay(step), why)

    def _promote(self, step: int, theta: Callable[[], dict[str, torch.Tensor]], why: str) -> None:
        with self._placing:
            self._hold(step, theta, patience=None)
            self.promoted(step, why)
            self.versions.promote(step)

    def hold(self, step: int) -> None:
        """Rebuild a version from the log and put it into a slot.

        Raises:
            UserError: the log has not so many steps.
            Busy: no slot is free for it.
        """
        with self._placing:
            self._hold(step, lambda: self.replay(step), spare=1)

    def _hold(self, step: int, theta: Callable[[], dict[str, torch.Tensor]], **options) -> None:
        """Put a version into a slot, unless it is in one."""
        if step in self.versions.steps():
            return
        began, tensors = time.perf_counter(), as_lora(theta(), self.frozen)
        version, written = self.versions.reserve(**options), None
        try:
            self._place(version.slot, tensors)
            written = step
        finally:
            self.versions.fill(version, written)
        self.seconds_placing = time.perf_counter() - began

    def _place(self, slot: str, tensors: dict[str, torch.Tensor]) -> None:
        path = self._scratch.path / "version.safetensors"
        self._scratch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        deadline = time.monotonic() + PATIENCE
        try:
            # a request that its client gave up is with the engine for a moment longer
            while not all(answer["placed"] for answer in self.engine.call("place", slot=slot, path=str(path))):
                if time.monotonic() > deadline:
                    raise RunError(f"the engine did not end the requests on {slot} within {PATIENCE:.0f} s")
                time.sleep(PAUSE)
        finally:
            path.unlink()
