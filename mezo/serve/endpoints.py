"""Our endpoints beside SGLang's: the models that users may name, status, promotion, pause and resume of training."""

import asyncio
import time
from collections.abc import Callable

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from mezo.errors import UserError
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
            "/mezo/promote": ("POST", self.promote),
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
            },
            "seconds_up": time.monotonic() - session.began,
        }

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
