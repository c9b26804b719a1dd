"""SGLang's own HTTP server around the engine that is trained, and the gate that all requests of users go through."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from socket import socket
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from mezo.errors import RunError, UserError
from mezo.runtimes.sglang.engine import engine_environment
from mezo.serve.engine import ENDING, ServedEngine, training
from mezo.serve.learning import Recent
from mezo.serve.runtime import ServingRuntime
from mezo.serve.versions import NAME, Busy, Version, step_of

OFFERED = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/models", "/v1/score",
    "/v1/tokenize", "/v1/detokenize", "/tokenize", "/detokenize", "/generate", "/health", "/health_generate", "/ready",
    "/ping", "/metrics", "/model_info", "/get_model_info", "/mezo", "/freeze_gc",
)  # fmt: skip
"""Paths of SGLang's server, with what is below them, that leave the engine as it is. Others load adapters, flush caches
or change weights under the trainer's hands."""
STARTING = 60.0  # seconds that the server may take to listen


def check_libraries() -> None:
    """Raise UserError where SGLang's server cannot be imported: it needs more libraries than its engine."""
    try:
        with engine_environment():
            import sglang.srt.entrypoints.http_server  # noqa: F401  seconds, which a test of the gate does without
    except ImportError as error:
        raise UserError(f"mezo serve: {error}; install it: pip install 'mezo-kernels[sglang]'") from error


class OfferedAlone:
    """ASGI middleware: paths that are not OFFERED are refused."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").rstrip("/")
        known = not path or any(path == offered or path.startswith(f"{offered}/") for offered in OFFERED)
        if scope["type"] == "lifespan" or (scope["type"] == "http" and known):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            message = f"{path:.60} is not offered by mezo serve, whose engine is being trained"
            await JSONResponse({"error": message}, status_code=403)(scope, receive, send)


class Gate:
    """In place of `TokenizerManager.generate_request`: users' requests name versions, and are counted.

    A request is given the slot of the version that it names, which stays as it is until the request is answered. It
    cannot name a slot, least of all one with a perturbed copy in it. The trainer's own requests pass as they are.

    Args:
        runtime: whose engine it is.
        recent: remembers answers.
    """

    def __init__(self, runtime: ServingRuntime, recent: Recent):
        self.recent = recent
        self.runtime, self.manager = runtime, runtime.engine.engine.tokenizer_manager
        self.tokens = {"prompt": 0, "completion": 0}
        self._original = self.manager.generate_request
        self.manager.generate_request = self.generate_request

    async def generate_request(self, obj: Any, request: Any = None) -> AsyncIterator[dict]:
        """See `TokenizerManager.generate_request`.

        Args:
            obj: the request; what it says of adapters and cache namespaces is replaced.
            request: of HTTP.
        """
        if training.get():
            async for answer in self._original(obj, request):
                yield answer
            return
        versions: list[Version] = []
        prompts = self._prompts(obj)
        try:
            await self._resolve(obj, versions)
            with self.runtime.admission.user(streamed=bool(getattr(obj, "stream", False))) as waiting:
                async with aclosing(self._original(obj, request)) as answers:
                    async for answer in answers:
                        waiting.saw()
                        self._mark(answer, versions)
                        if prompts:
                            self.recent.add(prompts, answer if isinstance(answer, list) else [answer])
                        yield answer
        finally:
            for version in versions:
                self.runtime.versions.release(version)

    def _prompts(self, obj: Any) -> Any:
        """What a request gives the model to read, if its answer may be judged: text or tokens, or a list of these."""
        in_parts = getattr(obj, "stream", False) and getattr(self.manager, "incremental_streaming_output", False)
        if in_parts or getattr(obj, "image_data", None):
            return None
        return obj.text if getattr(obj, "text", None) is not None else getattr(obj, "input_ids", None)

    async def _resolve(self, obj: Any, versions: list[Version]) -> None:
        """Put the slots of the versions that a request names in their place; they are added to `versions`."""
        named = obj.lora_path
        names = named if isinstance(named, list) else [named]
        found = [await self._version(name, versions) for name in names]
        slots = [version and version.slot for version in found]
        obj.lora_path, obj.lora_id = (slots if isinstance(named, list) else slots[0]), None
        # what a user calls a namespace is a part of one of ours, so that it is never the trainer's
        salts = [version.salt if version else "" for version in found]
        if len(set(salts)) > 1:
            raise ValueError("one request names several versions: send a request for each")
        shared = self.runtime.cache.shared  # no key or value depends on theta: versions need no namespaces
        for field in ("cache_salt", "extra_key"):
            of_user = getattr(obj, field, None)
            salt = salts[0] if field == "cache_salt" and not shared else ""
            within = lambda value, salt=salt: f"{salt}/user/{value}" if value else salt or None  # noqa: E731
            value = [within(each) for each in of_user] if isinstance(of_user, list) else within(of_user)
            if value is not None:
                setattr(obj, field, value)

    async def _version(self, name: str | None, versions: list[Version]) -> Version | None:
        """The version that a user names, which is read from now on; None is the base."""
        if not name:
            return None
        step = step_of(name)
        version = self.runtime.versions.take(step)
        if version is None and step is None:
            raise ValueError(f"no version of {NAME} is promoted yet: ask the base model, or later")
        while version is None:
            try:
                await asyncio.to_thread(self.runtime.hold, step)
            except (Busy, RunError) as error:
                raise ValueError(str(error)) from error
            version = self.runtime.versions.take(step)
        versions.append(version)
        return version

    def _mark(self, answer: dict | list[dict], versions: list[Version]) -> None:
        """Say in an answer which version gave it; count its tokens where it is whole."""
        for each in answer if isinstance(answer, list) else [answer]:
            meta = each.get("meta_info", {})
            meta["weight_version"] = versions[0].name if versions else "base"
            meta.pop("weight_versions", None)
            if meta.get("finish_reason"):
                self.tokens["prompt"] += meta.get("prompt_tokens", 0)
                self.tokens["completion"] += meta.get("completion_tokens", 0)


class Server:
    """The HTTP server, which runs in the engine's event loop until `close`.

    Args:
        engine: that answers.
        bound: the socket.
        add_routes: adds endpoints of ours to the application.
    Raises:
        RunError: it does not start.
    """

    def __init__(self, engine: ServedEngine, bound: socket, add_routes: Callable[[FastAPI], None]):
        from sglang.srt.entrypoints import http_server
        from sglang.srt.runtime_context import get_serving
        from sglang.srt.utils.auth import add_api_key_middleware

        self.engine, serving, app, own = engine, get_serving(), http_server.app, engine.engine
        infos = own._scheduler_init_result.scheduler_infos
        http_server.set_global_state(http_server._GlobalState(own.tokenizer_manager, own.template_manager, infos[0]))
        app.is_single_tokenizer_mode, app.server_args = True, own.server_args
        app.warmup_thread_kwargs = {"server_args": own.server_args}
        routes = app.router.routes
        routes[:] = [route for route in routes if not getattr(route, "path", "").startswith("/v1/models")]
        add_routes(app)
        app.add_middleware(OfferedAlone)
        add_api_key_middleware(app, api_key=serving.api_key, admin_api_key=serving.admin_api_key)
        files = ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_keyfile_password")
        ssl = {name: getattr(serving, name) for name in files}
        config = uvicorn.Config(app, root_path=serving.fastapi_root_path, log_level="error", lifespan="on", **ssl)
        self.server = uvicorn.Server(config)
        self._serving = asyncio.run_coroutine_threadsafe(self.server.serve(sockets=[bound]), engine.loop)
        deadline = time.monotonic() + STARTING
        while not self.server.started:
            if self._serving.done() or time.monotonic() > deadline:
                error = self._serving.exception() if self._serving.done() else "it does not answer"
                raise RunError(f"the HTTP server did not start: {error}")
            time.sleep(0.05)

    def close(self) -> None:
        """Take no more requests; those that are being answered have a while."""
        self.server.should_exit = True
        try:
            self._serving.result(ENDING)
        except TimeoutError:
            self.server.force_exit = True
            self._serving.result(ENDING)
