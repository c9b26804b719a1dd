"""Our endpoints beside SGLang's: the models that users may name, status and metrics, promotion, pause and resume of
training, and what users teach it."""

import asyncio
import time
from collections.abc import Callable

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from mezo.errors import RunError, UserError
from mezo.serve.learning import MOST_OF_A_BODY, Unknown
from mezo.serve.metrics import TYPE, exposition
from mezo.serve.session import Session
from mezo.serve.versions import NAME


class Body(BaseModel):
    """A request's body: what is not known is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Promotion(Body):
    """A version by the number of steps that made it."""

    step: int = Field(ge=0, lt=10**9)


class Endpoints:
    """What `mezo serve` answers itself.

    Args:
        session: that is served.
    """

    def __init__(self, session: Session):
        self.session = session

    def add(self, app: FastAPI) -> None:
        """Add the endpoints to SGLang's application, whose API key they ask for too."""
        routes: dict[str, tuple[str, Callable]] = {
            "/v1/models": ("GET", self.models),
            "/mezo/status": ("GET", self.status),
            "/mezo/metrics": ("GET", self.metrics),
            "/mezo/promote": ("POST", self.promote),
            "/mezo/feedback": ("POST", self.feedback),
            "/mezo/examples": ("POST", self.examples),
            "/mezo/pause": ("POST", self.pause),
            "/mezo/resume": ("POST", self.resume),
        }
        for path, (method, endpoint) in routes.items():
            app.add_api_route(path, endpoint, methods=[method])

    async def models(self) -> dict:
        """The base, the promoted version, and those that are at hand, as OpenAI lists models."""
        name, versions = self.session.model, self.session.runtime.versions
        adapters = [NAME, *(f"{NAME}@{step}" for step in versions.steps())]
        created, names = int(time.time()), [name, *(f"{name}:{adapter}" for adapter in adapters)]
        return {
            "object": "list",
            "data": [{"id": each, "object": "model", "created": created, "owned_by": "mezo"} for each in names],
        }

    async def status(self) -> dict:
        """What is served, how far the training is, and who has used the engine."""
        session, runtime = self.session, self.session.runtime
        own = runtime.admission
        keys = ("step", "loss", "accuracy", "f1", "reward", "is_best")
        rows = list(session.trainer.evaluations.metrics) if session.trainer else session.directory.read_metrics()
        dev = [{key: row[key] for key in keys if row.get(key) is not None} for row in rows if row["split"] == "dev"]
        return {
            "model": session.model,
            "run": str(session.directory.path),
            "state": session.state,
            "step": len(session.records),
            "steps": session.steps,
            "dev": dev,
            "promoted": runtime.versions.promoted,
            "promotions": list(session.promotions.steps),
            "versions": runtime.versions.steps(),
            "seconds_of_last_version": runtime.seconds_placing,
            "users": {**own.row(), "tokens": session.gate.tokens, "seconds": own.seconds["users"]},
            "training": {
                "tokens": {"steps": runtime.tokens.scored, "evaluations": runtime.eval_tokens.scored},
                "seconds": own.seconds["training"],
                "seconds_held_back": own.seconds["held"],
                "seconds_of_a_part": own.limit,
                "parts": own.parts_row(),
            },
            "fed": session.fed,
            "seconds_up": time.monotonic() - session.began,
        }

    async def metrics(self) -> Response:
        """The same for Prometheus."""
        return Response(exposition(await self.status()), media_type=TYPE)

    async def feedback(self, request: Request) -> JSONResponse:
        """Keep the score of an answer, see `Learning.feedback`."""
        return await _kept(request, self.session.learning.feedback)

    async def examples(self, request: Request) -> JSONResponse:
        """Keep further rows of the task, see `Learning.examples`."""
        return await _kept(request, self.session.learning.examples)

    async def promote(self, body: Promotion) -> JSONResponse:
        """Have users be answered by a step of the log."""
        began = time.perf_counter()
        try:
            await asyncio.to_thread(self.session.promote, body.step)
        except UserError as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        return JSONResponse({"promoted": body.step, "seconds": time.perf_counter() - began})

    async def pause(self) -> dict:
        """Hold the training back, at once and until `resume`."""
        self.session.runtime.admission.pause(True)
        return {"state": self.session.state}

    async def resume(self) -> dict:
        """Go on training."""
        self.session.runtime.admission.pause(False)
        return {"state": self.session.state}


async def _kept(request: Request, keep: Callable[[bytes], dict]) -> JSONResponse:
    """The answer to a request that teaches the run something: it is on the disk by then."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_OF_A_BODY:
            message = f"the body: it has more than {MOST_OF_A_BODY:,} bytes: send less at a time"
            return JSONResponse({"error": message}, status_code=413)
    try:
        return JSONResponse(await asyncio.to_thread(keep, body))
    except UserError as error:
        return JSONResponse({"error": str(error)}, status_code=404 if isinstance(error, Unknown) else 400)
    except RunError as error:
        return JSONResponse({"error": str(error)}, status_code=507)
