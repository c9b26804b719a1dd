"""How far generated text is a right answer: F1 and exact match of SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250)."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case without ASCII punctuation, articles and repeated white space, in the order of SQuAD's own script.

    >>> normalise(" The cat's  hat. ")
    'cats hat'
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(output: str, reference: str) -> float:
    """1 if the two are the same once normalised, else 0.

    >>> exact_match("The Ice", "ice."), exact_match("ice cold", "ice")
    (1.0, 0.0)
    """
    return float(normalise(output) == normalise(reference))


def f1(output: str, reference: str) -> float:
    """F1 = 2 P R / (P + R) of the normalised words as bags; of two texts without words 1, of one without 0.

    >>> round(f1("the cold ice", "ice and snow"), 4), f1("", "the"), f1("", "ice")
    (0.4, 1.0, 0.0)
    """
    words, wanted = normalise(output).split(), normalise(reference).split()
    if not words or not wanted:
        return float(words == wanted)
    shared = sum((Counter(words) & Counter(wanted)).values())
    return 2 * shared / (len(words) + len(wanted))


METRICS: dict[str, Callable[[str, str], float]] = {"f1": f1, "exact_match": exact_match}
"""By the name that an evaluation reports."""


def best(metric: Callable[[str, str], float], output: str, references: Sequence[str]) -> float:
    """The highest value over the right answers, as published for SQuAD, ReCoRD and (in the MeZO paper) DROP.

    Args:
        metric: of one output and one reference.
        output: text that was generated or chosen.
        references: every right answer, at least one.

    >>> best(f1, "ice", ["Ice is", "ice"])
    1.0
    """
    return max(metric(output, reference) for reference in references)
