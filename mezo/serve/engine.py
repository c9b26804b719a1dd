"""An engine whose event loop runs in a thread of its own, so that users are answered whatever the trainer does."""

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from contextvars import ContextVar
from typing import Any

from mezo.runtimes.sglang.engine import POLL, EngineHandle

training: ContextVar[bool] = ContextVar("training", default=False)
"""True where a request is sent on behalf of the trainer."""
ENDING = 10.0  # seconds that open connections have, once the server ends


class ServedEngine(EngineHandle):
    """A running engine that several threads use: the trainer's, and that of the event loop, where HTTP is served.

    Args:
        arguments, scratch, patience: see `EngineHandle`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._calling = threading.Lock()
        self.loop = self.engine.loop
        self._thread = threading.Thread(target=self.loop.run_forever, name="serving", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine) -> Any:
        """What a coroutine returns that runs in the event loop; signals reach this thread meanwhile."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            while True:
                try:
                    return future.result(POLL)
                except concurrent.futures.TimeoutError:
                    if future.done():
                        raise
        finally:
            future.cancel()

    def call(self, method: str, **parameters) -> list[dict]:
        """See `EngineHandle.call`; one thread at a time."""
        with self._calling:
            return super().call(method, **parameters)

    def generate(self, **request) -> list[dict]:
        """See `EngineHandle.generate`."""
        return self.run(self._guarded(request))

    async def _guarded(self, request: dict) -> list[dict]:
        training.set(True)  # of this task, and of those that it starts
        return await super()._guarded(request)

    def close(self) -> None:
        """End the engine, its tasks and the thread."""
        if not self._thread.is_alive():
            return
        self.run(self._cancel_tasks())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(ENDING)
        self._shut_down()

    async def _cancel_tasks(self) -> None:
        tasks = [task for task in self.engine.tokenizer_manager.asyncio_tasks if not task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), ENDING)
