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
    """Answers as a worker does; after some calls of `time` it ends as `end` says."""

    def __init__(self, calls: list, times: int | None = None, end=KeyboardInterrupt):
        self.calls, self.times, self.end = calls, times, end

    def ask(self, call: str, **key) -> dict:
        if call == "time" and self.times is not None:
            if self.times == 0:
                raise self.end
            self.times -= 1
        self.calls.append((call, key.get("case")))
        if call == "peak":
            return {"flops": 100.0}
        if call == "prepare":
            return {"examples": 8, "filled": 30, "positions": 40}
        return {"seconds": 2.0}


def run(peers, path, settings, workers, repetitions=2):
    """The measurements of one command: the record, and the lines that it says."""
    record, said = peers.Record(path, settings, {"cpu": "x"}, {}), []
    units = peers.plan(workers, ["rte"], repetitions, record, [])
    progress = peers.Progress(units, said.append)
    peers.measure(workers, ["rte"], repetitions, record, progress)
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
    run(peers, path, {"batches": 5, "packages of peft": "peft 1"}, {"peft": Side([])})
    with pytest.raises(ValueError, match=r"other settings: batches 5 \(now 3\)"):
        run(peers, path, {"batches": 3}, {"ours": Side([])})
    with pytest.raises(ValueError, match=r"packages of peft peft 1 \(now peft 2\)"):
        run(peers, path, {"batches": 5, "packages of peft": "peft 2"}, {"peft": Side([])})
    with pytest.raises(ValueError, match=r"other settings: decode_batches None \(now 10\)"):
        run(peers, path, {"batches": 5, "decode_batches": 10}, {"ours": Side([])})
    # A peer may come or go.
    run(peers, path, {"batches": 5, "packages of t5x": "t5x 1"}, {"t5x": Side([])})
    kept = json.loads(pathlib.Path(path).read_text())
    assert set(kept["settings"]) == {"batches", "packages of peft", "packages of t5x"}
    assert len(kept["results"]["rte"]) == 6


def test_a_peer_that_fails_is_told_and_left_out_and_what_it_gave_is_kept(peers, tmp_path):
    path = str(tmp_path / "out.json")
    workers = {"ours": Side([]), "peft": Side([], 3, peers.Failed("train rte longest: no memory"))}
    found, said, _ = run(peers, path, {}, workers)
    assert found["missing"] == {"PEFT": "failed: train rte longest: no memory"}
    rates = {name: len(x["rates"]) for name, x in found["results"]["rte"].items()}
    assert rates["ours train buckets"] == rates["ours rank buckets"] == 2
    assert rates["peft train longest"] == rates["peft decode sorted"] == 1
    assert "about 0.0 left" in said[-1]
    found["machine"] |= {"cores": "2", "load_average": "0", "python": "3"}
    lines = peers.report(found, ["rte"])
    assert "PEFT: failed: train rte longest: no memory." in lines
    assert "| ours train buckets / peft train longest | 1.5, WiC 1.2 | 1.00 |" in lines

    # The next run tries it again; ours may not fail.
    found, _, units = run(peers, path, {}, {"ours": Side([]), "peft": Side([])})
    assert found["missing"] == {} and {name.split()[0] for _, name, _ in units} == {"peft"}
    with pytest.raises(peers.Failed):
        run(peers, None, {}, {"ours": Side([], 1, peers.Failed("no"))})


def test_the_message_at_the_end_of_a_traceback_is_found(peers):
    text = "Traceback (most recent call last):\n  File x\n    y\njax.errors.Bad: wrong\nshape [2]\n"
    assert peers.last_error(text) == "jax.errors.Bad: wrong shape [2]"
    assert peers.last_error("killed\n") == "killed"
    assert "nothing" in peers.last_error("")


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

    rte = {"ours train buckets": case(8.0, 9.0, 20.0), "t5x train 512": case(2, 1, 2)}
    found = {
        "settings": {"packages of ours": "jax 1"}, "details": {}, "results": {"rte": rte},
        "machine": {"cpu": "x", "cores": "2", "load_average": "0", "python": "3"},
        "missing": {"PEFT": "not asked for"},
    }  # fmt: skip
    lines = peers.report(found, ["rte"])
    assert "packages of ours: jax 1." in lines
    # Of the ratios 4, 9 and 10, not of the medians 9 and 2.
    assert "| ours train buckets / t5x train 512 | 4.5 | 9.00 |" in lines
    assert "| t5x train 512 | 2.00 (50% full) |" in lines
    assert "PEFT: not asked for." in lines


def test_an_absent_peer_is_told_with_what_does_not_import(peers):
    assert peers.versions(sys.executable, ("json", "numpy")) == f"numpy {np.__version__}"
    for python, modules, said in (
        (None, ("json",), "not asked for"),
        (sys.executable, ("json", "no_such.part"), "absent: no_such.part does not import: Module"),
        ("/no/such/python", ("json",), "does not start"),
    ):
        with pytest.raises(peers.Failed, match=said):
            peers.versions(python, modules)


def test_more_batches_are_timed_where_inputs_are_decoded_by_length(peers):
    import worker

    class Side:
        def batches(self, *key):
            return [{"ids": np.zeros((1, n))} for n in range(1, 9)]

        def width(self, batch):
            return batch["ids"].shape[1]

        def run(self, *_):
            pass

        def counts(self, case, batch):
            return {"examples": 1, "width": self.width(batch)}

    settings, count = {"cpu_time": False, "batches": 2, "decode_batches": 4}, {}
    for case, layout in (("train", "buckets"), ("decode", "512"), ("decode", "sorted")):
        call = {"call": "prepare", "case": case, "task": "rte", "layout": layout}
        count[case, layout] = worker.answer(Side(), settings, {}, call)["examples"]
    assert list(count.values()) == [2, 2, 4]


def test_bfloat16_is_not_left_out_on_a_gpu(peers, monkeypatch, capsys):
    flags = ["--data_dir=x", "--vocabulary_file=x", "--device=gpu", "--no_bfloat16"]
    monkeypatch.setattr(sys, "argv", ["peers.py", *flags])
    with pytest.raises(SystemExit):
        peers.main()
    assert "--no_bfloat16 is for a CPU" in capsys.readouterr().err


def test_what_computes_on_another_device_is_not_measured(peers, monkeypatch):
    import jax
    import worker

    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    with pytest.raises(ValueError, match="JAX computes on the cpu, expected the gpu"):
        worker.Ours({"device": "gpu", "cpu_devices": 1, "training": True})


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
