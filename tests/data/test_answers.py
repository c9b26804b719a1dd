"""F1 and exact match against values computed by hand."""

import pytest

from mezo.data.answers import best, exact_match, f1, normalise

CASES = [  # output, reference, F1, exact match
    ("Denver Broncos", "the Denver Broncos!", 1.0, 1.0),
    ("Broncos", "Denver Broncos", 2 / 3, 0.0),
    ("a b c d", "b d e", 2 * (2 / 3) * (2 / 3) / (4 / 3), 0.0),  # "a" is an article: P = 2/3, R = 2/3
    ("ice ice snow", "ice", 2 * (1 / 3) * 1 / (4 / 3), 0.0),
    ("two", "2", 0.0, 0.0),
    ("", "3", 0.0, 0.0),
    ("The", "", 1.0, 1.0),
    ("U.S.", "us", 1.0, 1.0),
    ("1,000", "1000", 1.0, 1.0),
]


@pytest.mark.parametrize(("output", "reference", "value", "exact"), CASES)
def test_f1_and_exact_match(output, reference, value, exact):
    assert f1(output, reference) == pytest.approx(value, rel=1e-15)
    assert f1(reference, output) == f1(output, reference)
    assert exact_match(output, reference) == exact


def test_articles_are_whole_words_and_go_after_punctuation():
    assert normalise("An anthem, (the) theatre; a.b") == "anthem theatre ab"
    assert normalise("the\n\ta-the  ANT") == "athe ant"


def test_the_best_reference_counts():
    assert best(f1, "Ice is", ["snow", "Ice", "ice IS!"]) == 1.0
    assert best(exact_match, "Ice is", ["snow", "Ice"]) == 0.0
    assert best(f1, "Ice is", ["snow", "Ice"]) == pytest.approx(2 / 3)
