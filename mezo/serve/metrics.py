"""What a served run is doing, in the text format of Prometheus."""

from collections.abc import Iterator, Mapping
from typing import Any

TYPE = "text/plain; version=0.0.4; charset=utf-8"
Sample = tuple[Mapping[str, object], float]


def exposition(status: Mapping[str, Any]) -> str:
    """The metrics of a status, as /mezo/status has it.

    >>> print(exposition({"step": 3}))
    # HELP mezo_step Training steps done.
    # TYPE mezo_step gauge
    mezo_step 3
    <BLANKLINE>
    """
    return "".join(
        f"# HELP {name} {text}\n# TYPE {name} {kind}\n" + "".join(_line(name, *sample) for sample in samples)
        for name, kind, text, samples in _families(status)
        if samples
    )


def _families(status: Mapping[str, Any]) -> Iterator[tuple[str, str, str, list[Sample]]]:
    """(name, kind, what it is, samples) of each metric; without samples where a status has nothing of it."""
    users, training, fed = (status.get(name, {}) for name in ("users", "training", "fed"))
    latest = (status.get("dev") or [{}])[-1]
    one = lambda value: [] if value is None else [({}, value)]  # noqa: E731
    each = lambda label, values: [({label: name}, value) for name, value in values.items()]  # noqa: E731
    yield "mezo_step", "gauge", "Training steps done.", one(status.get("step"))
    yield "mezo_steps_planned", "gauge", "Training steps that the run is to have.", one(status.get("steps"))
    yield "mezo_promoted_step", "gauge", "Step of the version that users are given.", one(status.get("promoted"))
    state = status.get("state")
    yield "mezo_state", "gauge", "1 for what the trainer does.", [({"state": state}, 1)] if state else []
    figures = {name: value for name, value in latest.items() if name not in ("step", "is_best")}
    yield "mezo_dev", "gauge", "Figures of the last evaluation of dev.", each("figure", figures)
    yield "mezo_dev_step", "gauge", "Step of the last evaluation of dev.", one(latest.get("step"))
    spent = {f"users_{name}": value for name, value in users.get("tokens", {}).items()}
    spent |= {f"training_{name}": value for name, value in training.get("tokens", {}).items()}
    yield "mezo_tokens_total", "counter", "Tokens, by whose they are.", each("of", spent)
    seconds = {"users": users.get("seconds"), "training": training.get("seconds")}
    seconds["training_held_back"] = training.get("seconds_held_back")
    known = {name: value for name, value in seconds.items() if value is not None}
    yield "mezo_seconds_total", "counter", "Seconds that users were answered in, or training ran.", each("of", known)
    yield "mezo_user_requests_total", "counter", "Requests of users that have ended.", one(users.get("requests"))
    waits = [
        ({"until": until, "training": kind == "behind_a_part", "percentile": p}, row[f"p{p}"])
        for until, kinds in users.get("seconds_waited", {}).items()
        for kind, row in kinds.items()
        for p in (50, 99)
        if f"p{p}" in row
    ]
    yield (
        "mezo_user_wait_seconds",
        "gauge",
        "What users waited for, who found training running or did not.",
        waits,
    )
    counts = {name: fed[name] for name in ("feedback", "example") if name in fed}
    yield "mezo_fed_total", "counter", "Lines of feedback.jsonl.", each("kind", counts)
    yield "mezo_fed_refused_total", "counter", "Requests to feed the run that were refused.", one(fed.get("refused"))
    yield "mezo_fed_in_use", "gauge", "Lines of feedback.jsonl that batches draw from.", one(fed.get("in_use"))


def _line(name: str, labels: Mapping[str, object], value: float) -> str:
    written = ",".join(f'{label}="{_escaped(str(each))}"' for label, each in labels.items())
    return f"{name}{f'{{{written}}}' if written else ''} {value}\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
