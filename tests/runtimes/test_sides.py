"""Which copies a step reads: doctests of `Sides` have the rest."""

from mezo.runtimes.sides import Sides


def reading(one_sided):
    asked = []
    return Sides(one_sided), asked, lambda names: (asked.append(names), list(names))[1]


def test_two_sided_reads_both_signs_every_time():
    sides, asked, read = reading(False)
    for _ in range(2):
        assert sides.pairs(2, "batch", read) == [("plus0", "minus0"), ("plus1", "minus1")]
    assert asked == [["plus0", "minus0", "plus1", "minus1"]] * 2


def test_theta_is_read_anew_where_it_or_the_batch_is_another():
    sides, asked, read = reading(True)
    for change in (lambda: None, lambda: sides.written(False), lambda: sides.written(True), sides.loaded):
        change()
        sides.pairs(1, "batch", read)
    sides.pairs(1, "other", read)
    assert [len(names) for names in asked] == [2, 1, 2, 2, 2]


def test_noise_is_measured_in_both_copies():
    sides, asked, read = reading(True)
    sides.equalised()
    for _ in range(2):
        sides.pairs(1, "batch", read)
    sides.written(theta_changed=False)
    sides.pairs(1, "batch", read)
    sides.pairs(1, "batch", read)
    assert asked == [["plus0", "minus0"]] * 3 + [["plus0"]]
