import json
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safeshard.manifests import RequestError, RunError
from safeshard.streamer.write.journal import MAGIC, Journal

FINGERPRINT = {"method": "safemerge", "options": {"threshold": 0.35}, "inputs": ["a", {"size": 3}]}
RECORDS = [{"name": f"t{i}", "hash": f"{i:064x}", "value": i / 3, "odd": 'q"\n\x00é'} for i in range(4)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def tensors(journal: Journal) -> list[dict[str, object]]:
    return [{k: v for k, v in entry.items() if k != "kind"} for entry in journal.entries("tensor")]


def write(path: Path) -> bytes:
    with Journal.open(path, FINGERPRINT) as journal:
        for record in RECORDS:
            journal.record("tensor", **record)
            journal.commit()
    return path.read_bytes()


def test_committed_records_come_back_by_kind(path: Path) -> None:
    with Journal.open(path, FINGERPRINT) as journal:
        journal.record("tensor", name="a")
        journal.record("module", name="m")
        journal.record("tensor", name="b")
        assert journal.entries("tensor") == []
        journal.commit()
        journal.record("tensor", name="never committed")
    with Journal.open(path, FINGERPRINT) as journal:
        assert tensors(journal) == [{"name": "a"}, {"name": "b"}]
        assert journal.entries("module") == [{"kind": "module", "name": "m"}]


def test_it_is_json_lines(path: Path) -> None:
    first, *records = [json.loads(line) for line in write(path).splitlines()]
    assert first["journal"] == "safeshard.journal/1"
    assert first["fingerprint"] == FINGERPRINT
    assert [r["name"] for r in records] == ["t0", "t1", "t2", "t3"]


def test_torn_at_every_byte_it_goes_on_from_whole_records(path: Path) -> None:
    whole = write(path)
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        complete = max(whole[:length].count(b"\n") - 1, 0)
        with Journal.open(path, FINGERPRINT) as journal:
            assert tensors(journal) == RECORDS[:complete]
            for record in RECORDS[complete:]:
                journal.record("tensor", **record)
            journal.commit()
        assert path.read_bytes() == whole


def test_a_tail_of_zeros_is_cut_off(path: Path) -> None:
    whole = write(path)
    for kept in (0, 10, len(whole)):
        path.write_bytes(whole[:kept] + bytes(100))
        with Journal.open(path, FINGERPRINT) as journal:
            assert tensors(journal) == (RECORDS if kept == len(whole) else [])


def test_a_flipped_bit_anywhere_loses_what_follows_and_nothing_else(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = write(path)
    for position in {*range(0, len(whole), 7), len(whole) - 1}:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        caplog.clear()
        if position < len(MAGIC):
            with pytest.raises(RequestError, match="--overwrite"):
                Journal.open(path, FINGERPRINT)
            assert path.read_bytes() == damaged
            continue
        line = whole[:position].count(b"\n")
        with Journal.open(path, FINGERPRINT) as journal:
            assert tensors(journal) == RECORDS[: max(line - 1, 0)]
        assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[: max(line, 1)])
        assert position == len(whole) - 1 or f"damaged from line {line + 1}" in caplog.text


def test_another_file_is_not_overwritten(path: Path) -> None:
    path.write_text("someone's notes")
    with pytest.raises(RequestError, match="expected a safeshard journal"):
        Journal.open(path, FINGERPRINT)
    assert path.read_text() == "someone's notes"


def test_every_difference_of_the_request_is_listed(path: Path) -> None:
    write(path)
    other = {"method": "safemerge", "options": {"threshold": 0.4, "seed": 1}, "inputs": ["a", {}]}
    with pytest.raises(RequestError) as caught:
        Journal.open(path, other)
    assert [(o.what, o.expected, o.got) for o in caught.value.offences] == [
        ("inputs.1", "nothing", "{}"),
        ("inputs.1.size", "3", "nothing"),
        ("options.seed", "nothing", "1"),
        ("options.threshold", "0.35", "0.4"),
    ]
    assert all("--overwrite" in o.remedy for o in caught.value.offences)


def test_equal_requests_are_equal_as_json(path: Path) -> None:
    Journal.open(path, {"weights": (0.8, 0.2), "b": 1, "a": True}).close()
    Journal.open(path, {"a": True, "b": 1, "weights": [0.8, 0.2]}).close()
    with pytest.raises(RequestError):
        Journal.open(path, {"a": 1, "b": 1, "weights": [0.8, 0.2]})


def test_two_runs_at_once_are_refused(path: Path) -> None:
    with Journal.open(path, FINGERPRINT), pytest.raises(RequestError, match="no other run"):
        Journal.open(path, FINGERPRINT)
    Journal.open(path, FINGERPRINT).close()


def test_what_is_no_json_is_refused_when_recorded(path: Path) -> None:
    with Journal.open(path, FINGERPRINT) as journal:
        with pytest.raises(ValueError, match="JSON compliant"):
            journal.record("tensor", value=float("nan"))
        journal.commit()
        assert journal.entries("tensor") == []


def test_the_data_is_synced_before_the_records_are_written(path: Path) -> None:
    with Journal.open(path, FINGERPRINT) as journal:
        before = path.stat().st_size
        sizes: list[int] = []

        def sync() -> None:
            sizes.append(path.stat().st_size)
            journal.record("tensor", name="late")

        journal.record("tensor", name="early")
        journal.commit(sync)
        assert sizes == [before]
        assert tensors(journal) == [{"name": "early"}]
        journal.commit()
        assert tensors(journal) == [{"name": "early"}, {"name": "late"}]


def test_each_commit_syncs_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    with Journal.open(path, FINGERPRINT) as journal:
        for name in "abc":
            journal.record("tensor", name=name)
        journal.commit()
        journal.commit()
    assert len(synced) == 1


def test_after_a_failed_write_nothing_more_is_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes, offset: int) -> int:
        os.truncate(path, offset)
        with path.open("ab") as file:
            file.write(data[:5])
        raise OSError(28, "No space left on device")

    with Journal.open(path, FINGERPRINT) as journal:
        journal.record("tensor", name="a")
        journal.commit()
        journal.record("tensor", name="b")
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", full)
            with pytest.raises(OSError, match="No space"):
                journal.commit()
        journal.record("tensor", name="c")
        with pytest.raises(RunError, match="could not be written"):
            journal.commit()
        assert tensors(journal) == [{"name": "a"}]
    with Journal.open(path, FINGERPRINT) as journal:
        assert tensors(journal) == [{"name": "a"}]


def test_short_writes_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))
    write(path)
    with Journal.open(path, FINGERPRINT) as journal:
        assert tensors(journal) == RECORDS


def test_threads_commit_together(path: Path) -> None:
    with Journal.open(path, FINGERPRINT) as journal:

        def work(worker: int) -> None:
            for step in range(20):
                journal.record("tensor", name=f"{worker}.{step}")
                journal.commit()
                assert {"name": f"{worker}.{step}"} in tensors(journal)

        threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with Journal.open(path, FINGERPRINT) as journal:
        found = [str(record["name"]) for record in tensors(journal)]
    assert sorted(found) == sorted(f"{worker}.{step}" for worker in range(4) for step in range(20))
    for worker in range(4):
        assert [n for n in found if n.startswith(f"{worker}.")] == [f"{worker}.{step}" for step in range(20)]


payloads = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda key: key not in ("self", "kind")),
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    max_size=3,
)


@settings(deadline=None, max_examples=30)
@given(st.lists(payloads, max_size=6))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, object]]) -> None:
    path = tmp_path_factory.mktemp("journal") / "j"
    with Journal.open(path, {}) as journal:
        for record in records:
            journal.record("tensor", **record)
        journal.commit()
        assert tensors(journal) == records
    with Journal.open(path, {}) as journal:
        assert tensors(journal) == records


def test_records_are_those_of_their_time_and_come_in_order(path: Path) -> None:
    entry = {"weights": (0.8, 0.2)}
    with Journal.open(path, FINGERPRINT) as journal:
        for number in range(3):
            journal.record("module", entry=entry | {"number": number})
            entry["weights"] = (number, 0.0)  # what is recorded was recorded as it was
            journal.commit()
            found = [record["entry"] for record in journal.entries("module")]
            assert [each["number"] for each in found] == [*range(number + 1)]
        assert [each["weights"] for each in found] == [[0.8, 0.2], [0, 0.0], [1, 0.0]]
