"""Published experiments as data: what was run, how the best run was chosen, and what came out.

All are of Malladi et al. 2023, arXiv 2305.17333: RoBERTa-large with k examples a class (figure 2 and its numbers in the
appendix) and OPT-13B with 1,000 examples (table 1). A name that ends in -full is of MeZO on every parameter, the others
are of MeZO with LoRA (r 8, alpha 16, query and value).
"""

from dataclasses import dataclass
from typing import Literal

DATA_SEEDS = (13, 21, 42, 87, 100)
"""Of the few-shot samples, as in LM-BFF (Gao et al. 2021)."""


_ENDINGS = {"lora": "", "full": "-full"}
_COLUMNS = {"lora": "MeZO (LoRA)", "full": "MeZO"}


@dataclass(frozen=True)
class Protocol:
    """One published figure: an ordinary run for each data seed and learning rate, of which dev chooses one a seed.

    Args:
        name: what `mezo reproduce` takes.
        model: hub id.
        tuning: as `--tuning` takes it.
        task: as `--task` takes it.
        data: options of a run that say how many examples it keeps.
        data_seeds: a result is the mean over these; each is the seed of its run as well.
        lrs: learning rates tried; per data seed the run with the best dev score counts, the first of equals.
        eps, weight_decay, batch_size, steps: of each run; constant learning rate.
        evaluations: how often dev is looked at; a run's best dev checkpoint is tested.
        mean, std: published test score in per cent; std is None where none was published.
        table: where it was published.
        differs: what is known to be done otherwise here; empty if nothing is.

    >>> protocol = PROTOCOLS["roberta-sst2-k16"]
    >>> protocol.mean, protocol.std, protocol.steps, protocol.lrs
    (91.4, 0.9, 100000, (1e-05, 5e-05, 0.0001))
    """

    name: str
    model: str
    tuning: Literal["lora", "full"]
    task: str
    data: dict[str, int]
    data_seeds: tuple[int, ...]
    lrs: tuple[float, ...]
    eps: float
    weight_decay: float
    batch_size: int
    steps: int
    evaluations: int
    mean: float
    std: float | None
    table: str
    differs: str


def _roberta(task: str, k: int, mean: float, std: float, tuning: Literal["lora", "full"] = "lora") -> Protocol:
    # hub test sets of at most 1,000 are kept whole
    larger, lora = {"num_test": 1000} if task in ("sst5", "snli", "mnli") else {}, tuning == "lora"
    return Protocol(
        name=f"roberta-{task}-k{k}{_ENDINGS[tuning]}",
        model="FacebookAI/roberta-large",
        tuning=tuning,
        task=task,
        data={"k_shot": k, **larger},
        data_seeds=DATA_SEEDS,
        lrs=(1e-5, 5e-5, 1e-4) if lora else (1e-7, 1e-6, 1e-5),
        eps=1e-3,
        weight_decay=0.1 if lora else 0.0,
        batch_size=64,
        steps=100_000,
        evaluations=10,
        mean=mean,
        std=std,
        table=f"figure 2, {_COLUMNS[tuning]}",
        differs="the published runs trained the LM head as well" if lora else "",
    )


def _opt(task: str, mean: float, tuning: Literal["lora", "full"] = "lora", **data: int) -> Protocol:
    lora = tuning == "lora"
    return Protocol(
        name=f"opt13b-{task}{_ENDINGS[tuning]}",
        model="facebook/opt-13b",
        tuning=tuning,
        task=task,
        data={"num_train": 1000, "num_dev": 500, **data},
        data_seeds=(0,),
        lrs=(1e-4, 5e-5) if lora else (1e-6, 1e-7),
        eps=1e-2 if lora else 1e-3,
        weight_decay=0.0,
        batch_size=16,
        steps=20_000,
        evaluations=5,
        mean=mean,
        std=None,
        table=f"table 1, {_COLUMNS[tuning]}",
        differs="the seed of the published run's sample is not known; one of our own is used",
    )


# task -> k -> tuning -> (mean, std)
_ROBERTA = {
    "sst2": {16: {"lora": (91.4, 0.9), "full": (90.5, 1.2)}, 512: {"lora": (93.4, 0.4), "full": (93.3, 0.7)}},
    "sst5": {16: {"lora": (43.0, 1.6), "full": (45.5, 2.0)}, 512: {"lora": (52.4, 0.8), "full": (53.2, 1.4)}},
    "snli": {16: {"lora": (69.7, 6.0), "full": (68.5, 3.9)}, 512: {"lora": (84.0, 0.8), "full": (83.0, 1.0)}},
    "mnli": {16: {"lora": (64.0, 2.5), "full": (58.7, 2.5)}, 512: {"lora": (77.9, 0.6), "full": (78.3, 0.5)}},
    "rte": {16: {"lora": (64.9, 3.6), "full": (64.0, 3.3)}, 512: {"lora": (77.6, 1.3), "full": (78.6, 2.0)}},
    "trec": {16: {"lora": (73.1, 6.5), "full": (76.9, 2.7)}, 512: {"lora": (95.0, 0.7), "full": (94.3, 1.3)}},
}
# task -> (data, tuning -> mean)
_OPT = {
    "sst2": ({}, {"lora": 89.6, "full": 91.4}),
    "rte": ({}, {"lora": 67.9, "full": 66.1}),
    "boolq": ({"num_test": 1000}, {"lora": 73.8, "full": 67.6}),
    "wic": ({}, {"lora": 59.7, "full": 61.1}),
    "multirc": ({"num_test": 1000}, {"lora": 61.5, "full": 60.1}),
    "copa": ({"num_train": 0, "num_dev": 100}, {"lora": 84.0, "full": 88.0}),
    "record": ({"num_test": 1000}, {"lora": 81.2, "full": 81.7}),
    "squad": ({"num_test": 1000}, {"lora": 83.8, "full": 84.7}),
    "drop": ({"num_test": 1000}, {"lora": 31.4, "full": 30.9}),
}
PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for tuning in ("lora", "full")
    for protocol in (
        *(_roberta(task, k, *by[tuning], tuning) for task, shots in _ROBERTA.items() for k, by in shots.items()),
        *(_opt(task, by[tuning], tuning, **data) for task, (data, by) in _OPT.items()),
    )
}
"""By name. Of the paper's OPT tasks, CB and WSC have too few examples for balanced splits of these sizes."""
