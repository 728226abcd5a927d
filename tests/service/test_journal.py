"""The journal gives back what was committed, however it was merged, and whoever writes late."""

import random
from contextlib import suppress
from dataclasses import replace

import pytest

from service import journal as journal_module
from service.blobs import FileBlobs, memory_blobs
from service.errors import StoreUnavailableError
from service.journal import AUDIT, Journal, JournalEntry
from service.records import Commit

WEEK_S = 7 * 24 * 3600
BATCH = "batch/t/P1"


class Clock:
    """Seconds since 1970, as the test says."""

    def __init__(self):
        self.seconds = 1_000_000_000.0

    def __call__(self):
        return self.seconds


class FailingBlobs:
    """Blobs of which deletions, or reads, fail or do something else first."""

    def __init__(self, blobs):
        self.blobs = blobs
        self.before_delete = lambda _: None
        self.before_get = lambda _: None

    def __getattr__(self, name):
        return getattr(self.blobs, name)

    def get(self, name):
        self.before_get(name)
        return self.blobs.get(name)

    def delete(self, names):
        for name in names:
            self.before_delete(name)
            self.blobs.delete([name])


@pytest.fixture(autouse=True)
def few_entries(monkeypatch):
    """Entries are merged from four on."""
    monkeypatch.setattr(journal_module, "MERGED_FROM", 4)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(params=["files", "objects"])
def blobs(request, tmp_path):
    return FailingBlobs(FileBlobs(tmp_path / "blobs") if request.param == "files" else memory_blobs())


@pytest.fixture
def journal(blobs, clock):
    return Journal(blobs, clock)


def committed(journal, changes, cleared=(), scope=BATCH, settled=0):
    """What the records would have the journal keep."""
    return replace(journal.entry(Commit(changes, cleared=cleared, scope=scope), changes), settled=settled)


def keep(journal, sequence, changes, cleared=(), scope=BATCH):
    """Keep a commit that nothing is missing before, as the records do; gives what would be kept late once more."""
    entry = committed(journal, changes, cleared, scope, sequence - 1)
    journal.keep(sequence, entry)
    journal.conclude(sequence, entry)
    return sequence, entry


def rebuilt(journal):
    """The records that the journal gives."""
    records = {}
    for _, entry in journal.entries():
        if entry.cleared:
            records = {key: value for key, value in records.items() if not key.startswith(tuple(entry.cleared))}
        records |= entry.changes
    return {key: value for key, value in records.items() if value is not None}


def names(journal, scope):
    """What lies in a scope, without its place."""
    return [name.removeprefix(f"journal/{scope}/") for name in journal.blobs.names(f"journal/{scope}/")]


def refuse(name):
    raise StoreUnavailableError(f"{name}: the process dies here")


def test_what_is_volatile_is_not_kept_and_nothing_is_no_entry(journal):
    assert journal.entry(Commit({}), {"lease/job/t/1": b"x", "idempotency/t/k": b"y"}) is None
    _, entry = keep(journal, 1, {"a": b"1", "b": None, "lease/x": b"x"})
    assert JournalEntry.from_bytes(entry.to_bytes()) == entry
    assert entry.changes == {"a": b"1", "b": None}


def test_rows_and_the_audit_log_outlive_the_batch_that_they_were_committed_with(journal):
    rows = {"job/t/1": b"done", "delivery/t/2": b"due", "webhook/t/3": b"w", "key/4": b"k"}
    keep(journal, 1, {"audit/entry/1": b"one", "part/t/P1/a": b"x", **rows})
    keep(journal, 2, {BATCH: None, "audit/entry/2": b"two"}, cleared=("part/t/P1/",))
    assert rebuilt(journal) == {"audit/entry/1": b"one", "audit/entry/2": b"two", **rows}
    assert len(names(journal, BATCH)) == 1


def test_the_audit_log_is_brought_to_safety_last(journal):
    _, entry = keep(journal, 1, {"audit/end": b"1", "part/t/P1/a": b"x", "job/t/1": b"done"})
    assert [part.scope for part in entry.by_scope()] == [BATCH, "job/t/1", AUDIT]


def test_a_row_that_is_gone_leaves_its_end_alone(journal):
    keep(journal, 1, {"job/t/1": b"queued"})
    keep(journal, 2, {"job/t/1": b"done"})
    keep(journal, 3, {"job/t/1": None, "audit/entry/1": b"one"})
    assert rebuilt(journal) == {"audit/entry/1": b"one"}
    assert len(names(journal, "job/t/1")) == 1


def test_an_end_whose_process_died_before_it_let_go_of_its_scope_is_concluded_when_entries_are_merged(journal):
    keep(journal, 1, {"part/t/P1/a": b"x"})
    journal.keep(2, committed(journal, {BATCH: None}, ("part/t/P1/",), settled=1))
    keep(journal, 3, {"part/t/P1/b": b"y"})
    assert rebuilt(journal) == {"part/t/P1/b": b"y"}
    journal.compact(complete=1)
    assert len(names(journal, BATCH)) == 3
    journal.compact(complete=3)
    assert [name[16:22] for name in names(journal, BATCH)] == ["-gone-", ""]
    assert rebuilt(journal) == {"part/t/P1/b": b"y"}


def test_what_lies_behind_a_gap_at_the_end_was_not_acknowledged_and_is_set_aside(journal):
    keep(journal, 1, {"part/t/P1/a": b"x", "audit/entry/1": b"x"})
    for sequence in (2, 4):
        journal.keep(sequence, committed(journal, {f"part/t/P1/{sequence}": b"x", "audit/end": b"x"}, settled=1))
    assert journal.set_aside() == 2
    assert rebuilt(journal) == {"part/t/P1/a": b"x", "part/t/P1/2": b"x", "audit/entry/1": b"x", "audit/end": b"x"}
    assert journal.blobs.names("unacknowledged") == [
        f"unacknowledged/journal/audit/{4:016d}",
        f"unacknowledged/journal/{BATCH}/{4:016d}",
    ]
    assert journal.set_aside() == 0


def test_a_commit_of_which_a_part_did_not_arrive_is_set_aside(journal):
    keep(journal, 1, {"part/t/P1/a": b"x", "audit/entry/1": b"x"})
    journal.keep(2, committed(journal, {"part/t/P1/b": b"y", "audit/entry/2": b"y", "job/t/1": b"done"}, settled=1))
    journal.blobs.delete([f"journal/audit/{2:016d}"])
    before = {"part/t/P1/a": b"x", "audit/entry/1": b"x"}
    assert (journal.set_aside(), rebuilt(journal)) == (2, before)


def test_what_was_merged_or_has_ended_is_no_gap(journal, clock):
    for number in range(1, 6):
        keep(journal, number, {BATCH: str(number).encode()})
    journal.compact(complete=5)
    keep(journal, 6, {"job/t/1": b"queued"})
    end = committed(journal, {"job/t/1": None}, settled=5)
    journal.keep(8, committed(journal, {"job/t/2": b"queued"}, settled=5))
    journal.keep(7, end)
    journal.conclude(7, end)
    clock.seconds += WEEK_S + 1
    journal.compact(complete=8)
    before = rebuilt(journal)
    assert journal.set_aside() == 0
    assert rebuilt(journal) == before == {BATCH: b"5", "job/t/2": b"queued"}
    assert Journal(memory_blobs()).set_aside() == 0


def test_what_ended_is_forgotten_when_nobody_can_be_writing_what_was_before(journal, clock):
    late = keep(journal, 1, {"part/t/P1/a": b"x"})
    keep(journal, 2, {BATCH: None}, cleared=("part/t/P1/",))
    journal.keep(*late)
    assert rebuilt(journal) == {}
    journal.compact(complete=2)
    assert len(names(journal, BATCH)) == 1
    journal.keep(*late)
    clock.seconds += WEEK_S + 1
    journal.compact(complete=2)
    assert len(names(journal, BATCH)) == 1, "it tells how far the journal is whole"
    keep(journal, 3, {"job/t/1": None})
    journal.compact(complete=3)
    assert names(journal, BATCH) == []


def test_a_batch_that_is_begun_anew_counts_from_its_beginning(journal, clock):
    keep(journal, 1, {"part/t/P1/a": b"old", "part/t/P1/b": b"old"})
    keep(journal, 2, {BATCH: None}, cleared=("part/t/P1/",))
    keep(journal, 3, {"part/t/P1/a": b"new"})
    clock.seconds += WEEK_S + 1
    journal.compact(complete=3)
    assert rebuilt(journal) == {"part/t/P1/a": b"new"}


def test_many_entries_become_one_snapshot_that_changes_the_same(journal):
    for number in range(1, 6):
        keep(journal, number, {BATCH: str(number).encode(), f"part/t/P1/{number}": b"x"})
    before = rebuilt(journal)
    journal.compact(complete=5)
    assert names(journal, BATCH) == [f"{5:016d}-snapshot"]
    assert rebuilt(journal) == before
    for number in range(6, 10):
        keep(journal, number, {BATCH: str(number).encode(), "part/t/P1/1": None})
    before = rebuilt(journal)
    journal.compact(complete=9)
    assert names(journal, BATCH) == [f"{9:016d}-snapshot"]
    assert rebuilt(journal) == before


def test_few_entries_and_those_that_others_may_still_precede_are_left_as_they_are(journal):
    for number in range(1, 8):
        keep(journal, number, {BATCH: str(number).encode()})
    journal.compact(complete=3)
    assert len(names(journal, BATCH)) == 7
    journal.compact(complete=5)
    assert names(journal, BATCH) == [f"{5:016d}-snapshot", f"{6:016d}", f"{7:016d}"]


def test_an_entry_that_is_written_late_once_more_changes_nothing_and_goes(journal):
    entries = [keep(journal, number, {BATCH: str(number).encode()}) for number in range(1, 6)]
    journal.compact(complete=5)
    journal.keep(*entries[1])
    assert rebuilt(journal) == {BATCH: b"5"}
    journal.compact(complete=5)
    assert names(journal, BATCH) == [f"{5:016d}-snapshot"]


def test_the_audit_log_is_merged_in_ranges_that_are_never_written_again(journal):
    for number in range(1, 5):
        keep(journal, number, {f"audit/entry/{number}": b"x", "audit/end": str(number).encode()})
    journal.compact(complete=4)
    (first,) = names(journal, AUDIT)
    was = journal.blobs.get(f"journal/{AUDIT}/{first}")
    for number in range(5, 9):
        keep(journal, number, {f"audit/entry/{number}": b"x", "audit/end": str(number).encode()})
    before = rebuilt(journal)
    journal.compact(complete=8)
    assert names(journal, AUDIT) == [f"{4:016d}-snapshot", f"{8:016d}-snapshot"]
    assert journal.blobs.get(f"journal/{AUDIT}/{first}") == was
    assert rebuilt(journal) == before


def test_a_process_that_dies_between_a_snapshot_and_the_deletion_of_what_it_holds_does_no_harm(journal):
    for number in range(1, 6):
        keep(journal, number, {BATCH: str(number).encode(), f"audit/entry/{number}": b"x"})
    before = rebuilt(journal)
    journal.blobs.before_delete = refuse
    with pytest.raises(StoreUnavailableError):
        journal.compact(complete=5)
    assert rebuilt(journal) == before
    journal.blobs.before_delete = lambda _: None
    journal.compact(complete=5)
    journal.compact(complete=5)
    assert rebuilt(journal) == before
    assert len(journal.blobs.names("journal")) == 2


def test_two_processes_may_merge_the_same_at_once(journal):
    for number in range(1, 6):
        keep(journal, number, {BATCH: str(number).encode(), f"part/t/P1/{number}": b"x"})
    before = rebuilt(journal)

    def another_merges(_):
        journal.blobs.before_get = lambda _: None
        Journal(journal.blobs.blobs, journal.now).compact(complete=5)

    journal.blobs.before_get = another_merges
    journal.compact(complete=5)
    assert names(journal, BATCH) == [f"{5:016d}-snapshot"]
    assert rebuilt(journal) == before


def lose_the_end(rng, journal, sequence, records):
    """Redis is flushed while some commits are on their way to the journal, which then ends with what went before."""
    begun = [committed(journal, {f"job/t/{rng.randrange(5)}": b"lost"}, settled=sequence - 1) for _ in range(5)]
    arrived = [number for number in range(5) if rng.random() < 0.5]
    for number in rng.sample(arrived, len(arrived)):
        journal.keep(sequence + number, begun[number])
    whole = next((number for number in range(5) if number not in arrived), 5)
    assert journal.set_aside() == len(arrived) - whole
    assert rebuilt(journal) == {
        **{key: value for key, value in records.items() if value is not None},
        **{key: value for entry in begun[:whole] for key, value in entry.changes.items()},
    }
    for number, entry in enumerate(begun[:whole]):
        for part in entry.by_scope():
            journal.blobs.delete([f"journal/{part.scope}/{sequence + number:016d}"])


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_in_whatever_order_the_same_records_are_rebuilt(seed, clock):
    rng = random.Random(seed)
    journal = Journal(FailingBlobs(memory_blobs()), clock)
    kept, records = [], {}
    for sequence in range(1, 130):
        if rng.random() < 0.05:
            lose_the_end(rng, journal, sequence, records)
        batch = rng.choice(["P1", "P2"])
        deleted = rng.random() < 0.05
        head, part = f"batch/t/{batch}", f"part/t/{batch}/"
        changes = {f"audit/entry/{sequence}": b"x", head: None if deleted else str(sequence).encode()}
        if deleted:
            records = {key: value for key, value in records.items() if not key.startswith(part)}
        else:
            changes[part + rng.choice("abc")] = rng.choice([None, str(sequence).encode()])
        changes[f"job/t/{rng.randrange(5)}"] = rng.choice([None, str(sequence).encode()])
        records |= changes
        kept.append(keep(journal, sequence, changes, (part,) if deleted else (), head))
        if rng.random() < 0.3:
            journal.keep(*rng.choice(kept))
        if rng.random() < 0.1:
            journal.blobs.before_delete = lambda name: refuse(name) if rng.random() < 0.2 else None
            with suppress(StoreUnavailableError):
                journal.compact(sequence)
            journal.blobs.before_delete = lambda _: None
        assert rebuilt(journal) == {key: value for key, value in records.items() if value is not None}
