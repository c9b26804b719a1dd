"""Published experiments as data: what was run, how the best run was chosen, and what came out.

All are MeZO with LoRA (r 8, alpha 16, query and value) of Malladi et al. 2023, arXiv 2305.17333: RoBERTa-large with k
examples a class (figure 2 and its numbers in the appendix) and OPT-13B with 1,000 examples (table 1).
"""

from dataclasses import dataclass

DATA_SEEDS = (13, 21, 42, 87, 100)
"""Of the few-shot samples, as in LM-BFF (Gao et al. 2021)."""


@dataclass(frozen=True)
class Protocol:
    """One published figure: an ordinary run for each data seed and learning rate, of which dev chooses one a seed.

    Args:
        name: what `mezo reproduce` takes.
        model: hub id.
        task: as `--task` takes it.
        data: options of a run that say how many examples it keeps.
        data_seeds: a result is the mean over these; each is the seed of its run as well.
        lrs: learning rates tried; per data seed the run with the best dev score counts, the first of equals.
        eps, weight_decay, batch_size, steps: of each run; constant learning rate.
        evaluations: how often dev is looked at; a run's best dev checkpoint is tested.
        mean, std: published test score in per cent; std is None where none was published.
        table: where it was published.
        differs: what is known to be done otherwise here.

    >>> protocol = PROTOCOLS["roberta-sst2-k16"]
    >>> protocol.mean, protocol.std, protocol.steps, protocol.lrs
    (91.4, 0.9, 100000, (1e-05, 5e-05, 0.0001))
    """

    name: str
    model: str
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


def _roberta(task: str, k: int, mean: float, std: float) -> Protocol:
    # hub test sets of at most 1,000 are kept whole
    larger = {"num_test": 1000} if task in ("sst5", "snli", "mnli") else {}
    return Protocol(
        name=f"roberta-{task}-k{k}",
        model="FacebookAI/roberta-large",
        task=task,
        data={"k_shot": k, **larger},
        data_seeds=DATA_SEEDS,
        lrs=(1e-5, 5e-5, 1e-4),
        eps=1e-3,
        weight_decay=0.1,
        batch_size=64,
        steps=100_000,
        evaluations=10,
        mean=mean,
        std=std,
        table="figure 2, MeZO (LoRA)",
        differs="the published runs trained the LM head as well",
    )


def _opt(task: str, mean: float, **data: int) -> Protocol:
    return Protocol(
        name=f"opt13b-{task}",
        model="facebook/opt-13b",
        task=task,
        data={"num_train": 1000, "num_dev": 500, **data},
        data_seeds=(0,),
        lrs=(1e-4, 5e-5),
        eps=1e-2,
        weight_decay=0.0,
        batch_size=16,
        steps=20_000,
        evaluations=5,
        mean=mean,
        std=None,
        table="table 1, MeZO (LoRA)",
        differs="the seed of the published run's sample is not known; one of our own is used",
    )


_ROBERTA = {
    "sst2": {16: (91.4, 0.9), 512: (93.4, 0.4)},
    "sst5": {16: (43.0, 1.6), 512: (52.4, 0.8)},
    "snli": {16: (69.7, 6.0), 512: (84.0, 0.8)},
    "mnli": {16: (64.0, 2.5), 512: (77.9, 0.6)},
    "rte": {16: (64.9, 3.6), 512: (77.6, 1.3)},
    "trec": {16: (73.1, 6.5), 512: (95.0, 0.7)},
}
_OPT = (
    _opt("sst2", 89.6),
    _opt("rte", 67.9),
    _opt("boolq", 73.8, num_test=1000),
    _opt("wic", 59.7),
    _opt("multirc", 61.5, num_test=1000),
    _opt("copa", 84.0, num_train=0, num_dev=100),
    _opt("record", 81.2, num_test=1000),
    _opt("squad", 83.8, num_test=1000),
    _opt("drop", 31.4, num_test=1000),
)
PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        *(_roberta(task, k, *score) for task, shots in _ROBERTA.items() for k, score in shots.items()),
        *_OPT,
    )
}
"""By name. Of the paper's OPT tasks, CB and WSC have too few examples for balanced splits of these sizes."""
