"""Losses and metrics as pure functions of option scores.

Scores are the mean log-probability of each option's tokens, float64 (batch, options); where an example has fewer
options than the widest one its row ends in -inf. Labels are the indices of the right options, int64 (batch,). A
`reduction` is "mean", or "none" for the loss of each example, (batch,): as of that example by itself, to the bit.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch


def cross_entropy(scores: torch.Tensor, labels: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """L = -1/B sum_b log softmax(scores_b)[labels_b], over the options.

    Args:
        scores: (batch, options), -inf where an example has no such option.
        labels: (batch,), int64.
        reduction: "mean" or "none".

    Returns:
        The loss, a float64 scalar.

    MeZO (Malladi et al. 2023, arXiv 2305.17333), section 2: the objective of the classification tasks.

    >>> cross_entropy(torch.tensor([[0.0, 0.0], [1.0, -torch.inf]]), torch.tensor([1, 0])).item()
    0.34657359027997264
    """
    return -_reduced(_right(scores.double().log_softmax(-1), labels), reduction)


def lm_cross_entropy(scores: torch.Tensor, labels: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """L = -1/B sum_b scores_b[labels_b]: the language model's loss on the right option, examples weighed alike.

    A mean over all tokens of a batch, as transformers' own loss is, would weigh an example by its answer's length.

    Args:
        scores: (batch, options).
        labels: (batch,), int64.
        reduction: "mean" or "none".

    Returns:
        The loss, a float64 scalar.

    >>> lm_cross_entropy(torch.tensor([[-1.0, -2.0], [-4.0, -3.0]]), torch.tensor([0, 1])).item()
    2.0
    """
    return -_reduced(_right(scores.double(), labels), reduction)


def negative_accuracy(scores: torch.Tensor, labels: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """L = -1/B sum_b [argmax scores_b = labels_b]; of equal scores the first is the prediction.

    A sum of steps: most small perturbations leave it as it is, and the projected gradient is then 0.

    Args:
        scores: (batch, options).
        labels: (batch,), int64.
        reduction: "mean" or "none".

    Returns:
        The loss, a float64 scalar in [-1, 0]; nan if a score is nan.

    >>> negative_accuracy(torch.tensor([[-1.0, -2.0], [-4.0, -3.0]]), torch.tensor([0, 0])).item()
    -0.5
    """
    # A nan score must not count as a wrong answer: it would hide a broken forward pass.
    broken = torch.where(scores.isnan().any(-1), torch.nan, 0.0).double()
    return -_reduced((predictions(scores) == labels).double() + broken, reduction)


Objective = Callable[..., torch.Tensor]
"""Of scores, labels and, "mean" by default, a reduction."""
OBJECTIVES: dict[str, Objective] = {
    "cross_entropy": cross_entropy,
    "lm_cross_entropy": lm_cross_entropy,
    "accuracy": negative_accuracy,
}
"""By the name that the configuration takes; every one is minimised. f1 and reward are of text: `mezo.data.rewards`."""


def mixture(weights: Mapping[str, float]) -> Objective:
    """L = sum_i w_i L_i over those of the named objectives that are functions of option scores.

    Args:
        weights: by name; names that are not in OBJECTIVES are left out.

    Returns:
        A function of scores, labels and a reduction, as the objectives are.

    >>> scores, labels = torch.tensor([[-1.0, -2.0]]), torch.tensor([0])
    >>> mixture({"lm_cross_entropy": 1.0, "accuracy": 0.5, "reward": 9.0})(scores, labels).item()
    0.5
    """
    terms = [(weight, OBJECTIVES[name]) for name, weight in weights.items() if name in OBJECTIVES]
    return lambda scores, labels, reduction="mean": sum(w * loss(scores, labels, reduction) for w, loss in terms)


def standardised(values: torch.Tensor) -> torch.Tensor:
    """(r - mean r) / std r over all values; zeros where all are equal, so that they say nothing and divide by nothing.

    Args:
        values: any shape, float64.

    Rewards of a population are z-scored so in Qiu et al. 2025, arXiv 2509.24372.

    >>> standardised(torch.tensor([1.0, 3.0])), standardised(torch.tensor([0.1, 0.1, 0.1]))
    (tensor([-1.,  1.]), tensor([0., 0., 0.]))
    """
    if bool((values == values.flatten()[0]).all()):
        return torch.zeros_like(values)
    return (values - values.mean()) / values.std(correction=0)


def centred(values: torch.Tensor, groups: Sequence[int]) -> torch.Tensor:
    """r - mean r over the texts of each prompt: those of both signs of every perturbation that it is measured under.

    The difference of two signs stays as it is. What goes is what prompts differ by, which says nothing of a
    perturbation, and which `standardised` would divide by.

    Args:
        values: (perturbations, 2, prompts), float64.
        groups: of each perturbation, the prompts it is measured on; those of one group have the same.

    >>> centred(torch.tensor([[[1.0, 8.0], [3.0, 8.0]], [[0.0, 1.0], [0.0, 1.0]]]), [0, 1]).flatten(1)
    tensor([[-1.,  0.,  1.,  0.],
            [ 0.,  0.,  0.,  0.]])
    """
    out = torch.empty_like(values)
    for group in dict.fromkeys(groups):
        rows = [k for k, own in enumerate(groups) if own == group]
        out[rows] = values[rows] - values[rows].mean((0, 1))
    return out


def standard_error(accuracy: float, n: int) -> float:
    """Of an accuracy that was measured on n examples, sqrt(p (1 - p) / n); at 0 and 1 that of half an example.

    >>> standard_error(0.5, 100), standard_error(1.0, 100)
    (0.05, 0.005)
    """
    return math.sqrt(max(accuracy * (1 - accuracy), 1 / (4 * n)) / n)


def predictions(scores: torch.Tensor) -> torch.Tensor:
    """argmax over the options, (batch,) int64; the first of equal scores, on every device.

    >>> predictions(torch.tensor([[0.0, 0.0, -1.0]])).item()
    0
    """
    options = scores.shape[-1]
    places = torch.arange(options, device=scores.device).expand_as(scores)
    # argmax may return any of several equal scores; a row with nan has no maximum and falls to its last option.
    best = places.masked_fill(scores != scores.amax(-1, keepdim=True), options - 1)
    return best.amin(-1)


def evaluate(scores: torch.Tensor, labels: torch.Tensor, objective: str = "cross_entropy") -> dict[str, float | None]:
    """Accuracy, loss, F1 and AUC of a split.

    Args:
        scores: (examples, options).
        labels: (examples,), int64.
        objective: what is trained; decides the loss.

    Returns:
        accuracy: share of examples whose right option has the highest score.
        loss: cross-entropy over the options; for lm_cross_entropy that objective itself.
        f1: of class 1 where there are two options, else the mean over the classes that occur or are predicted.
        auc: area under the ROC curve of scores[:, 1] - scores[:, 0]; None unless there are two options, both classes
            occur and every score is finite.
        A value that is not finite is None; so are accuracy and f1 where there is one option, which is always right.

    >>> metrics = evaluate(torch.tensor([[-1.0, -2.0], [-4.0, -3.0], [-1.0, -3.0]]), torch.tensor([0, 1, 1]))
    >>> {name: round(value, 4) for name, value in metrics.items()}
    {'accuracy': 0.6667, 'loss': 0.9178, 'f1': 0.6667, 'auc': 0.5}
    """
    from sklearn.metrics import f1_score  # a second of imports that training itself does not need

    predicted, right = predictions(scores).cpu().numpy(), labels.cpu().numpy()
    binary = scores.shape[1] == 2 and bool(scores.isfinite().all())
    loss = lm_cross_entropy if objective == "lm_cross_entropy" else cross_entropy
    values = {
        "accuracy": -negative_accuracy(scores, labels).item(),
        "loss": loss(scores, labels).item(),
        "f1": float(f1_score(right, predicted, average="binary" if binary else "macro", zero_division=0)),
        "auc": _auc(scores, labels) if binary else None,
    }
    if scores.shape[1] == 1:
        values |= {"accuracy": None, "f1": None}
    return {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}


def _auc(scores: torch.Tensor, labels: torch.Tensor) -> float | None:
    from sklearn.metrics import roc_auc_score

    if labels.unique().numel() < 2:
        return None
    return float(roc_auc_score(labels.cpu().numpy(), (scores[:, 1] - scores[:, 0]).cpu().numpy()))


def _reduced(values: torch.Tensor, reduction: str) -> torch.Tensor:
    return values.mean() if reduction == "mean" else values


def _right(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return values.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
