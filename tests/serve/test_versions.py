"""Which slot holds what: nothing that is read is ever written."""

import threading

import pytest

from mezo.errors import UserError
from mezo.serve.promotions import Promotions
from mezo.serve.versions import Busy, Versions, step_of


def held(slots, *steps):
    versions = Versions(list(slots))
    for step in steps:
        versions.fill(versions.reserve(), step)
    return versions


def test_a_request_keeps_the_version_that_it_began_under():
    versions = held("ab", 1)
    versions.promote(1)
    old = versions.take(None)
    versions.fill(versions.reserve(), 2)
    versions.promote(2)
    assert (old.step, versions.take(None).step) == (1, 2)
    with pytest.raises(Busy, match="--versions"):
        versions.reserve()
    versions.release(old)
    assert versions.reserve() is old


def test_a_slot_that_is_written_cannot_be_read_and_its_version_is_gone():
    versions = held("abc", 1)
    versions.promote(1)
    slot = versions.reserve()
    assert versions.take(slot.step or 99) is None
    versions.fill(slot, 5)
    read = versions.take(5)
    assert (read.slot, read.name) == (slot.slot, "mezo@5")


def test_what_was_asked_for_longest_ago_gives_way():
    versions = held("abc", 1, 2, 3)
    versions.promote(1)
    versions.release(versions.take(2))
    versions.fill(versions.reserve(), 4)
    assert versions.steps() == [1, 2, 4]


def test_each_writing_has_a_namespace_of_its_own():
    versions = held("ab", 1)
    versions.promote(1)
    salts = set()
    for step in range(2, 12):
        slot = versions.reserve()
        versions.fill(slot, step)
        salts.add(slot.salt)
    assert len(salts) == 10


def test_a_slot_stays_free_for_the_next_promotion():
    versions = held("abc", 1)
    versions.promote(1)
    versions.fill(versions.reserve(spare=1), 2)
    pinned = versions.take(2)
    with pytest.raises(Busy):
        versions.reserve(spare=1)
    versions.fill(versions.reserve(), 3)
    versions.promote(3)
    versions.release(pinned)


def test_a_promotion_waits_for_a_slot():
    versions = held("ab", 1, 2)
    versions.promote(1)
    reading, got = versions.take(2), []
    thread = threading.Thread(target=lambda: got.append(versions.reserve(patience=None)))
    thread.start()
    thread.join(0.2)
    assert not got
    versions.release(reading)
    thread.join(10)
    assert got[0].slot == reading.slot


def test_a_version_that_could_not_be_written_is_none():
    versions = held("ab", 1)
    versions.promote(1)
    versions.fill(versions.reserve(), None)
    assert versions.steps() == [1]


@pytest.mark.parametrize(
    "name", ["", "plus0", "mezo@", "mezo@x", "mezo@-1", "mezo@+1", "mezo@1_0", "mezo@" + "9" * 10, "mezo@٣"]
)
def test_other_names_are_refused(name):
    with pytest.raises(UserError, match="mezo@STEP"):
        step_of(name)


def test_promotions_are_read_again_and_a_torn_line_is_dropped(tmp_path):
    log = Promotions(tmp_path)
    assert log.last is None
    for step, why in ((0, "start"), (10, "dev"), (4, "hand")):
        log.append(step, why)
    with log.path.open("ab") as file:
        file.write(b'{"step": 9')
    again = Promotions(tmp_path)
    assert (again.steps, again.last) == ([0, 10, 4], 4)
    again.append(5, "hand")
    assert Promotions(tmp_path).steps == [0, 10, 4, 5]


@pytest.mark.parametrize("line", ['{"step": -1}', '{"step": "1"}', "{}", "[]", "x"])
def test_a_damaged_line_is_named(tmp_path, line):
    (tmp_path / "promoted.jsonl").write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(UserError, match="line 2"):
        Promotions(tmp_path)
