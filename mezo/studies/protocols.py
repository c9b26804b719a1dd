"""Published experiments as data: what was run, how the best run was chosen, and what came out.

All are of Malladi et al. 2023, arXiv 2305.17333: RoBERTa-large with k examples a class (figure 2 and its numbers in the
appendix) and OPT-13B with 1,000 examples (table 1). A name that ends in -full is of MeZO on every parameter, one in
-prefix on a prefix of 5 tokens; the others are of MeZO with LoRA (r 8, alpha 16, query and value).
"""

from dataclasses import dataclass
from typing import Literal

DATA_SEEDS = (13, 21, 42, 87, 100)
"""Of the few-shot samples, as in LM-BFF (Gao et al. 2021)."""

Tuning = Literal["lora", "full", "prefix"]
_ENDINGS = {"lora": "", "full": "-full", "prefix": "-prefix"}
_COLUMNS = {"lora": "MeZO (LoRA)", "full": "MeZO", "prefix": "MeZO (prefix)"}
_POSITIONS = "positions of the text follow those of the prefix, as in PEFT; the published text's began at the first"
# lrs, eps, weight decay (table 15), and what is done otherwise here
_ROBERTA_GRIDS = {
    "lora": ((1e-5, 5e-5, 1e-4), 1e-3, 0.1, "the published runs trained the LM head as well"),
    "full": ((1e-7, 1e-6, 1e-5), 1e-3, 0.0, ""),
    "prefix": ((1e-2, 5e-3, 1e-3), 1e-1, 0.0, _POSITIONS),
}
# lrs, those of SQuAD and DROP, eps (table 16)
_OPT_GRIDS = {
    "lora": ((1e-4, 5e-5), (1e-4, 5e-5, 1e-5), 1e-2),
    "full": ((1e-6, 1e-7), (1e-6, 5e-7, 1e-7), 1e-3),
    "prefix": ((1e-2, 1e-3), (5e-2, 1e-2, 5e-3), 1e-1),
}
_SAMPLE = "the sample of the published run is another one: it was drawn by NumPy"
_WEIGHED = "the loss weighs examples alike; the published one is a mean over all tokens of the answers in a batch"
_POSITIONS_OF_OPT, _GENERATED, _PREFIX = 2048, 50, 5  # of them a generated text and a prefix take these


@dataclass(frozen=True)
class Protocol:
    """One published figure: an ordinary run for each data seed and learning rate, of which dev chooses one a seed.

    Args:
        name: what `mezo reproduce` takes.
        model: hub id.
        tuning: as `--tuning` takes it.
        task: as `--task` takes it.
        data: options of a run that say how many examples it keeps.
        others: further options of a run.
        data_seeds: a result is the mean over these; each is the seed of its run as well.
        lrs: learning rates tried; per data seed the run whose kept step has the best dev score by the task's metric
            counts, the first of equals.
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
    tuning: Tuning
    task: str
    data: dict[str, int]
    others: dict[str, str | int]
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


def _roberta(task: str, k: int, mean: float, std: float, tuning: Tuning) -> Protocol:
    # of larger test sets 1,000 examples; others are kept whole
    larger = {"num_test": 1000} if task in ("sst5", "snli", "mnli") else {}
    lrs, eps, weight_decay, differs = _ROBERTA_GRIDS[tuning]
    return Protocol(
        name=f"roberta-{task}-k{k}{_ENDINGS[tuning]}",
        model="FacebookAI/roberta-large",
        tuning=tuning,
        task=task,
        data={"k_shot": k, **larger},
        others={"balance": "off", "dtype": "float32", "best_metric": "accuracy"},
        data_seeds=DATA_SEEDS,
        lrs=lrs,
        eps=eps,
        weight_decay=weight_decay,
        batch_size=64,
        steps=100_000,
        evaluations=10,
        mean=mean,
        std=std,
        table=f"figure 2, {_COLUMNS[tuning]}",
        differs="; ".join(filter(None, (differs, _SAMPLE))),
    )


def _opt(task: str, mean: float, tuning: Tuning, **data: int) -> Protocol:
    lrs, lrs_of_text, eps = _OPT_GRIDS[tuning]
    generated, prefix = task in ("squad", "drop"), tuning == "prefix"
    max_length = _POSITIONS_OF_OPT - _GENERATED * generated - _PREFIX * prefix
    weighed = task in ("copa", "record", "squad", "drop")
    return Protocol(
        name=f"opt13b-{task}{_ENDINGS[tuning]}",
        model="facebook/opt-13b",
        tuning=tuning,
        task=task,
        data={"num_train": 1000, "num_dev": 500, **data},
        others={"balance": "off", "dtype": "float16", "max_length": max_length, "best_metric": "loss"},
        data_seeds=(0,),
        lrs=lrs_of_text if generated else lrs,
        eps=eps,
        weight_decay=0.0,
        batch_size=16,
        steps=20_000,
        evaluations=5,
        mean=mean,
        std=None,
        table=f"table 1, {_COLUMNS[tuning]}",
        differs="; ".join([_SAMPLE] + [_WEIGHED] * weighed + [_POSITIONS] * prefix),
    )


# task -> k -> (mean, std) with LoRA, on every parameter, with a prefix
_ROBERTA = {
    "sst2": {16: ((91.4, 0.9), (90.5, 1.2), (90.8, 1.7)), 512: ((93.4, 0.4), (93.3, 0.7), (93.3, 0.1))},
    "sst5": {16: ((43.0, 1.6), (45.5, 2.0), (45.8, 2.0)), 512: ((52.4, 0.8), (53.2, 1.4), (53.6, 0.5))},
    "snli": {16: ((69.7, 6.0), (68.5, 3.9), (71.6, 2.5)), 512: ((84.0, 0.8), (83.0, 1.0), (84.8, 1.1))},
    "mnli": {16: ((64.0, 2.5), (58.7, 2.5), (63.4, 1.8)), 512: ((77.9, 0.6), (78.3, 0.5), (79.8, 1.2))},
    "rte": {16: ((64.9, 3.6), (64.0, 3.3), (65.4, 3.9)), 512: ((77.6, 1.3), (78.6, 2.0), (77.2, 0.8))},
    "trec": {16: ((73.1, 6.5), (76.9, 2.7), (80.3, 3.6)), 512: ((95.0, 0.7), (94.3, 1.3), (94.4, 0.7))},
}
# task -> (data, mean with LoRA, on every parameter, with a prefix); num_train 0: what is left beside dev, as in the
# published script, where train has fewer than both take (150 of CB, 54 of WSC, 300 of COPA)
_OPT = {
    "sst2": ({}, (89.6, 91.4, 90.7)),
    "rte": ({}, (67.9, 66.1, 70.8)),
    "cb": ({"num_train": 0, "num_dev": 100}, (66.1, 67.9, 69.6)),
    "boolq": ({"num_test": 1000}, (73.8, 67.6, 73.1)),
    "wsc": ({"num_train": 0}, (64.4, 63.5, 60.6)),
    "wic": ({}, (59.7, 61.1, 59.9)),
    "multirc": ({"num_test": 1000}, (61.5, 60.1, 63.7)),
    "copa": ({"num_train": 0, "num_dev": 100}, (84.0, 88.0, 87.0)),
    "record": ({"num_test": 1000}, (81.2, 81.7, 81.4)),
    "squad": ({"num_test": 1000}, (83.8, 84.7, 84.2)),
    "drop": ({"num_test": 1000}, (31.4, 30.9, 28.9)),
}
PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for i, tuning in enumerate(_ENDINGS)
    for protocol in (
        *(_roberta(task, k, *scores[i], tuning) for task, shots in _ROBERTA.items() for k, scores in shots.items()),
        *(_opt(task, means[i], tuning, **data) for task, (data, means) in _OPT.items()),
    )
}
"""By name: the paper's LoRA, full and prefix results of figure 2 and table 1."""
