"""`benchmarks/peers.py` without its peers: what is measured again after an interruption."""

import json
import pathlib
import sys

import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peers

    return peers


class Side:
    """Answers as a worker does; stops answering after some calls of `time`."""

    def __init__(self, calls: list, times: int | None = None):
        self.calls, self.times = calls, times

    def ask(self, call: str, **key) -> dict:
        if call == "time" and self.times is not None:
            if self.times == 0:
                raise KeyboardInterrupt
            self.times -= 1
        self.calls.append((call, key.get("case")))
        if call == "peak":
            return {"flops": 100.0}
        if call == "prepare":
            return {"examples": 8, "filled": 30, "positions": 40, "flops": 20.0}
        return {"seconds": 2.0}


def run(peers, path, settings, workers, repetitions=2):
    """The measurements of one command: the record, and the lines that it says."""
    record, said = peers.Record(path, settings, {"cpu": "x"}, {}), []
    units = peers.plan(workers, ["rte"], repetitions, record, [])
    progress = peers.Progress(units, said.append)
    peers.measure(workers, ["rte"], repetitions, record, progress.done)
    return record.found, said, units


def test_an_interrupted_run_goes_on_where_it_stopped(peers, tmp_path):
    path, settings = str(tmp_path / "out.json"), {"batches": 5}
    with pytest.raises(KeyboardInterrupt):
        run(peers, path, settings, {"t5x": Side([], times=4)})
    kept = json.loads(pathlib.Path(path).read_text())["results"]["rte"]
    # Three cases: the first repetition is whole, the second has one.
    assert [len(x["rates"]) for x in kept.values()] == [2, 1, 1]

    calls = []
    found, said, units = run(peers, path, settings, {"t5x": Side(calls)})
    assert [len(x["rates"]) for x in found["results"]["rte"].values()] == [2, 2, 2]
    # The whole case is neither prepared nor timed again.
    assert [x for x in calls if x[0] != "peak"] == [
        ("prepare", "train"), ("prepare", "decode"), ("time", "train"), ("time", "decode"),
    ]  # fmt: skip
    assert len(units) == 4 and len(said) == 5
    assert "t5x decode 512: 4.00 examples/s, 75% full (2 of 2)" in said[-1]
    assert json.loads(pathlib.Path(path).read_text()) == found

    assert run(peers, path, settings, {"t5x": Side([])})[2] == []
    more = run(peers, path, settings, {"t5x": Side([])}, repetitions=3)[0]
    assert [len(x["rates"]) for x in more["results"]["rte"].values()] == [3, 3, 3]


def test_figures_of_other_settings_are_not_mixed(peers, tmp_path):
    path = str(tmp_path / "out.json")
    run(peers, path, {"batches": 5, "sides": ["ours"]}, {"ours": Side([])})
    with pytest.raises(ValueError, match=r"other settings: batches 5 \(now 3\)"):
        run(peers, path, {"batches": 3, "sides": ["ours"]}, {"ours": Side([])})


def test_time_left_is_that_of_the_most_alike_measurements(peers):
    clock = iter([0.0, 10.0, 14.0, 15.0]).__next__
    units = [("prepare", "a", "rte"), ("time", "a", "rte"), ("time", "b", "rte"),
             ("time", "a", "wic"), ("prepare", "b", "rte")]  # fmt: skip
    said = []
    progress = peers.Progress(units, said.append, clock)
    progress.done(units[0], "")
    assert progress.left() == 40.0
    progress.done(units[1], "")
    # Other cases and tasks as long as the one timed, the preparation as the one prepared.
    assert progress.left() == 4.0 + 4.0 + 10.0
    progress.done(units[2], "")
    assert progress.left() == 4.0 + 10.0
    assert said[0] == "5 measurements to make"


def test_the_table_holds_ratios_within_a_repetition_and_their_goals(peers):
    def case(*rates):
        return {"rates": list(rates), "shares": [], "filled": 1, "positions": 2}

    results = {"rte": {"ours train buckets": case(8.0, 9.0, 20.0), "t5x train 512": case(2, 1, 2)}}
    about = {"cpu": "x", "cores": "2", "load_average": "0", "python": "3"}
    lines = peers.report(results, {}, about, {"PEFT": "not asked for"})
    # Of the ratios 4, 9 and 10, not of the medians 9 and 2.
    assert "| ours train buckets / t5x train 512 | 4.5 | 9.00 |" in lines
    assert "| t5x train 512 | 2.00 (50% full) |" in lines
    assert "PEFT: not asked for." in lines


def test_an_absent_peer_is_told_with_what_does_not_import(peers):
    assert peers.absent(None, ("json",)) == "not asked for"
    assert peers.absent(sys.executable, ("json",)) is None
    said = peers.absent(sys.executable, ("json", "no_such_module.part"))
    assert said.startswith("absent: no_such_module.part does not import: ModuleNotFoundError")
    assert "does not start" in peers.absent("/no/such/python", ("json",))


def test_peers_batches_are_cut_and_filled(peers, tmp_path):
    import worker

    rows = [np.arange(1, n + 1) for n in (3, 9, 5, 1)]
    arrays = {}
    for feature in ("inputs", "targets"):
        arrays[f"rte/train/{feature}/ids"] = np.concatenate(rows)
        arrays[f"rte/train/{feature}/ends"] = np.cumsum([len(x) for x in rows])
    np.savez(tmp_path / "tokens.npz", **arrays)
    settings = {"tokens": str(tmp_path / "tokens.npz"), "batch_size": 2}
    by_length = worker.groups(settings, "train", "rte", "sorted")
    assert [[len(x) for x in inputs] for inputs, _ in by_length] == [[1, 3], [5, 9]]
    assert [len(inputs) for inputs, _ in worker.groups(settings, "train", "rte", "512")] == [1] * 4
    found = worker.padded(by_length[1][0], 6, 0, np.int32)
    assert found.tolist() == [[1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 5, 6]]
