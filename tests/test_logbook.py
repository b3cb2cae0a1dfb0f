"""Progress on a terminal and in a log, and the curves that TensorBoard gets."""

import glob
import json
import os
import pathlib
import pty
import sys

import numpy as np
import pytest

from softprompt import data, logbook, optim, prompted, train
from softprompt.logbook import Progress, say, track


@pytest.fixture
def terminal(monkeypatch):
    """Call it to make standard output a terminal; the result gives what was written there."""
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(logbook, "REDRAW", 0.0)
    # Restored afterwards: a bar that a test leaves is not on the next one's terminal.
    monkeypatch.setattr(logbook, "_drawn", False)
    with os.fdopen(slave, "w", encoding="utf-8") as out:

        def written() -> str:
            out.flush()
            parts = []
            while True:
                try:
                    parts.append(os.read(master, 65536))
                except BlockingIOError:
                    return b"".join(parts).decode()

        def start():
            # Not before the test itself runs: pytest captures anew for it.
            monkeypatch.setattr(sys, "stdout", out)
            return written

        yield start
    os.close(master)


def fit(backbone, pairs, folder=None, **settings):
    examples = data.from_pairs(pairs, backbone.vocabulary, {"inputs": 16, "targets": 8})
    slots = prompted.slots(backbone.cfg.vocab_size, 3)
    return train.fit(
        backbone,
        data.train_batches([examples], [1.0], 4, 0, slots),
        optim.adafactor(0.3),
        6,
        prompt=np.full((3, backbone.cfg.emb_dim), 0.1, np.float32),
        evaluate=lambda flat, step: {"accuracy": 10.0 * step},
        eval_period=3,
        log_period=2,
        model_dir=folder,
        **settings,
    )


def test_a_terminal_has_one_line_that_is_rewritten(terminal):
    written = terminal()
    bar = Progress("sst2: predicting", 4, "batches")
    for done in (1, 2, 4):
        bar.update(done)
    said = written()
    assert "\n" not in said and said.count("\r") == 3
    assert "[#####---------------]  25%  sst2: predicting  1/4 batches" in said
    assert " batches/s  " in said and said.split("\r")[2].split("\x1b")[0].endswith(" left")
    say("a line of its own")
    assert written() == "\r\x1b[Ka line of its own\r\n", "the bar makes way for it"
    say("and another")
    assert written() == "and another\r\n"


def test_a_bar_never_breaks_the_line(terminal, monkeypatch):
    written = terminal()
    monkeypatch.setenv("COLUMNS", "40")
    Progress("a name that is far longer than the terminal is wide", 2, "batches").update(1)
    shown = written().split("\r")[1].removesuffix("\x1b[K")
    assert len(shown) == 39


def test_what_has_no_total_shows_its_count_and_rate(terminal):
    written = terminal()
    assert list(track(iter("abcd"), "reading train", "examples")) == list("abcd")
    said = written()
    assert "reading train  3 examples" in said and "examples/s" in said and "%" not in said
    assert said.endswith("\r\x1b[K"), "the bar is gone afterwards"


def test_the_bar_goes_when_an_item_fails(terminal):
    written = terminal()

    def items():
        yield from (1, 2)
        raise ValueError("torn")

    with pytest.raises(ValueError, match="torn"):
        list(track(items(), "reading", "rows"))
    assert written().endswith("\r\x1b[K")


def test_a_log_has_plain_lines_now_and_then(monkeypatch, capsys):
    clock = iter(np.arange(0.0, 1000.0, 10.0))
    monkeypatch.setattr(logbook.time, "monotonic", lambda: next(clock))
    bar = Progress("loading", 8, "tensors")
    for done in range(1, 8):
        bar.update(done)
    assert capsys.readouterr().out.splitlines() == [
        "loading  3/8 tensors  0.1 tensors/s  50s left",
        "loading  6/8 tensors  0.1 tensors/s  20s left",
    ]


def test_a_short_piece_of_work_says_nothing_in_a_log(capsys):
    assert len(list(track(range(1000), "reading", "rows", 1000))) == 1000
    assert capsys.readouterr().out == ""


def test_training_in_a_log_is_plain_lines_and_its_curves_are_tensorboards(
    tiny, pairs, tmp_path, capsys
):
    fit(tiny, pairs, tmp_path)
    said = capsys.readouterr().out
    assert "\r" not in said and "\x1b" not in said
    lines = said.splitlines()
    assert [x.split("  ")[0] for x in lines] == [
        "step 1", "step 2/6", "step 3", "step 4/6", "step 6/6", "step 6",
    ]  # fmt: skip
    assert "compiled and done in" in lines[0]
    assert "steps/s" in lines[1] and " left  " in lines[1]

    found = events(tmp_path)
    for name, prefix in (("train", "train"), ("eval/metrics", "eval")):
        rows = [json.loads(x) for x in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for key in set(rows[0]) - {"step"}:
            curve = found.pop(f"{prefix}/{key}")
            assert [step for step, _ in curve] == [row["step"] for row in rows]
            np.testing.assert_allclose([v for _, v in curve], [r[key] for r in rows], rtol=1e-6)
    assert not found


def events(folder):
    """The curves (step, value) in a folder's TensorBoard events, by tag."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in glob.glob(str(folder / "events*")):
        content = pathlib.Path(path).read_bytes()
        while content:
            # TFRecord: length, its checksum, the record, its checksum.
            size = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


OURS = '{"step": 1, "loss": 2.0}\n'


@pytest.mark.parametrize(
    "name, content",
    [
        ("train.jsonl", '{"step": 1, "text": "a fine film"}\n'),
        ("train.jsonl", '{"text": "a fine film"}'),
        ("train.jsonl", OURS + "a fine film\n" + OURS),
        ("eval/metrics.jsonl", '{"accuracy": 50.0}\n'),
    ],
)
def test_a_file_that_no_run_wrote_is_refused_and_stays(tiny, pairs, tmp_path, name, content):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{path.name}' is not one that a run wrote: line "):
        fit(tiny, pairs, tmp_path)
    with pytest.raises(ValueError, match="is not one that a run wrote"):
        train.check_resumable(tmp_path, {}, 6)
    assert path.read_text() == content
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path], "nothing else was written"


def test_a_log_is_cut_back_to_the_step_and_loses_a_torn_line(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(OURS + OURS.replace("1", "2") + '{"step": 3, "lo')
    logbook.Logbook(tmp_path, 1)
    assert path.read_text() == OURS


def test_training_on_a_terminal_moves_a_bar_and_keeps_the_evaluations(
    tiny, pairs, terminal, monkeypatch
):
    written = terminal()
    shown = fit(tiny, pairs)
    said = written()
    lines = [x.split("\x1b[K")[-1] for x in said.replace("\r\n", "\n").splitlines()]
    assert [x.split("  ")[0] for x in lines if x] == ["step 1", "step 3", "step 6/6", "step 6"]
    bars = [x for x in said.split("\r") if x.startswith("[")]
    steps = [x.split("%  ")[1].split("/6")[0] for x in bars]
    assert steps == ["step 1", "step 2", "step 4", "step 5"]
    assert "loss" in bars[1] and "steps/s" in bars[1] and " left" in bars[1]
    monkeypatch.setenv("TERM", "dumb")
    plain = fit(tiny, pairs)
    assert "[" not in written()
    assert np.array_equal(shown.trained[train.PROMPT], plain.trained[train.PROMPT])
