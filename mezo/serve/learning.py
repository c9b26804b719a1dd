"""What users teach a run that is served: scores of answers, and further examples, checked before they are kept."""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Le, MaxLen, MinLen
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError
from pydantic import model_validator as validates

from mezo.data.example import Example
from mezo.data.further import Further
from mezo.errors import UserError
from mezo.run.feedback import FeedbackLog

MOST_OF_A_BODY = 1 << 20  # bytes
MOST_ROWS = 1000  # of one request
REMEMBERED = 1000  # answers that a score may name
LONGEST = 1 << 16  # characters or tokens of a prompt or an answer that is remembered

Words = Annotated[str, MinLen(1), MaxLen(LONGEST)]


class Feedback(BaseModel):
    """How good an answer was: that to a request, or one that is given with its prompt."""

    model_config = ConfigDict(extra="forbid", strict=True)

    request_id: Annotated[str, MinLen(1), MaxLen(200)] | None = None
    prompt: Words | None = None
    completion: Words | None = None
    score: Annotated[FiniteFloat, Ge(-1), Le(1)]

    @validates(mode="after")
    def _names_one_answer(self) -> "Feedback":
        given = self.prompt is not None, self.completion is not None
        if any(given) if self.request_id else not all(given):
            raise ValueError("give request_id, or prompt and completion")
        return self


@dataclass(frozen=True)
class Answer:
    """What a user was answered.

    Args:
        prompt: as text, or as the tokens that the model was given.
        completion: the answer.
        tokens: of the answer.
    """

    prompt: str | tuple[int, ...]
    completion: str
    tokens: tuple[int, ...]


class Recent:
    """The last answers by the ids of their requests."""

    def __init__(self):
        self._answers: OrderedDict[str, Answer] = OrderedDict()
        self._changing = threading.Lock()

    def __len__(self) -> int:
        return len(self._answers)

    def __getitem__(self, request_id: str) -> Answer:
        with self._changing:
            if request_id not in self._answers:
                raise KeyError(request_id)
            return self._answers[request_id]

    def add(self, prompts: str | Sequence, answers: Sequence[dict]) -> None:
        """Remember what is whole of the answers to a request.

        Args:
            prompts: of the request: text or tokens, or a list of these.
            answers: as SGLang's tokenizer manager gives them.
        """
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        prompts = [prompts] if single else list(prompts)
        for i, answer in enumerate(answers):
            meta, at = answer.get("meta_info", {}), answer.get("index", i)
            why = meta.get("finish_reason")
            if not why or why.get("type") == "abort" or at >= len(prompts) or not isinstance(answer.get("text"), str):
                continue
            prompt, tokens = prompts[at], tuple(answer.get("output_ids") or ())
            if max(len(prompt), len(tokens), len(answer["text"])) <= LONGEST:
                kept = prompt if isinstance(prompt, str) else tuple(prompt)
                self._keep(str(meta["id"]), Answer(kept, answer["text"], tokens))

    def _keep(self, request_id: str, answer: Answer) -> None:
        with self._changing:
            self._answers[request_id] = answer
            while len(self._answers) > REMEMBERED:
                self._answers.popitem(last=False)


class Unknown(UserError):
    """A request that is not remembered."""


class Learning:
    """Takes what users say, and keeps what is right of it.

    Args:
        log: where it is kept.
        further: makes examples of it; None where the training set is read as it is drawn.
        refuse: raises UserError for examples that the engine has no room for.
        done: says how many steps are done.
    """

    def __init__(
        self,
        log: FeedbackLog,
        further: Further | None,
        refuse: Callable[[Sequence[Example]], None],
        done: Callable[[], int],
    ):
        self.log, self.further, self._refuse, self._done = log, further, refuse, done
        self.recent, self.refused, self._keeping = Recent(), 0, threading.Lock()

    def feedback(self, body: bytes) -> dict:
        """Keep the score of an answer; return what is answered.

        Args:
            body: of the request, JSON of `Feedback`.
        Raises:
            UserError: it is no such, names an answer that is not known, or the answer is no example of the task.
            RunError: the disk is full.
        """
        return self._counted(self._feedback, body)

    def examples(self, body: bytes) -> dict:
        """Keep further rows of the task, all or none; return what is answered.

        Args:
            body: of the request: JSON, a row as a line of --train-file has it, or a list of rows.
        Raises:
            UserError, RunError: as `feedback`.
        """
        return self._counted(self._rows, body)

    def _counted(self, keep: Callable[[bytes], dict], body: bytes) -> dict:
        with self._keeping:  # a tokenizer is not to be called by two threads at once
            try:
                return keep(body)
            except UserError:
                self.refused += 1
                raise

    def _feedback(self, body: bytes) -> dict:
        further = self._required()
        try:
            given = Feedback.model_validate(_json(body))
        except ValidationError as error:
            raise UserError(_why(error)) from error
        answer = self._answer(given)
        examples = further.of_answer(answer.prompt, answer.completion, answer.tokens, given.score)
        said = {"score": given.score, "prompt": answer.prompt, "completion": answer.completion}
        said |= {"request_id": given.request_id} if given.request_id else {}
        return self._keep("feedback", [(said, examples)])

    def _answer(self, given: Feedback) -> Answer:
        if not given.request_id:
            return Answer(given.prompt, given.completion, ())
        try:
            return self.recent[given.request_id]
        except KeyError:
            what = f"request_id: {given.request_id!r:.60} is none of the last {REMEMBERED} answers of this server"
            raise Unknown(f"{what}: give prompt and completion") from None

    def _rows(self, body: bytes) -> dict:
        further, given = self._required(), _json(body)
        rows = given if isinstance(given, list) else [given]
        if not 1 <= len(rows) <= MOST_ROWS:
            raise UserError(f"the body: expected a row, or a list of 1 to {MOST_ROWS} rows, got {len(rows)}")
        names = [f"row {i}" for i in range(len(rows))] if isinstance(given, list) else ["the row"]
        return self._keep("example", [(r, further.of_row(r, name)) for r, name in zip(rows, names, strict=True)])

    def _required(self) -> Further:
        if self.further is None:
            raise UserError("this run's training set is read as it is drawn, it takes no further examples")
        return self.further

    def _keep(self, kind: str, lines: Sequence[tuple[dict, list[Example]]]) -> dict:
        """Add lines to the log, all of whose examples have room."""
        for _, examples in lines:
            if examples:
                self._refuse(examples)
        self.log.append(self._done, kind, lines)
        return {"kept": len(lines), "examples": sum(len(examples) for _, examples in lines), "lines": len(self.log)}


def _json(body: bytes) -> Any:
    """What a body holds. Raises UserError where it is no JSON, or has numbers that are none."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON")

    try:
        return json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the body: it is not JSON ({error!s:.100})") from error


def _why(error: ValidationError) -> str:
    """The first thing that is wrong with a body, after the field."""
    first = error.errors(include_url=False, include_context=False)[0]
    field, text = ".".join(map(str, first["loc"]))[:60], first["msg"].removeprefix("Value error, ")
    text = text.replace("Input should be", "it must be")
    if first["type"] == "missing":
        return f"{field}: it is missing"
    if first["type"] == "extra_forbidden":
        return f"{field}: there is no such field; there are {', '.join(Feedback.model_fields)}"
    return f"{field}: {text}, got {first['input']!r:.60}" if field else f"the body: {text}"
