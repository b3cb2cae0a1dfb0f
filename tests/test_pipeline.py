"""Batches made ahead: the same order, the reader's own errors, a bounded queue, a clean end."""

import itertools
import threading
import time

import numpy as np
import pytest
from test_train import batches_of, bits, fit

from softprompt import pipeline, throughput, train


class Result:
    """Stands for a result of the device: ready when told so."""

    def __init__(self, ready: bool):
        self.ready = ready

    def is_ready(self) -> bool:
        return self.ready


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "batches"]


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_values_come_in_order_and_no_further_ahead_than_asked():
    read = []

    def source():
        for i in itertools.count():
            read.append(i)
            yield i

    with pipeline.Prefetch(source(), lambda x: 10 * x, ahead=2) as values:
        # Two wait in the queue, a third is finished and waits for a place.
        wait_for(lambda: len(read) == 3)
        time.sleep(0.05)
        assert read == [0, 1, 2]
        assert [values.next() for _ in range(5)] == [0, 10, 20, 30, 40]
    assert threads() == []


def test_the_readers_error_surfaces_as_it_was_after_what_came_before():
    error = ValueError("line 3: no label")

    def source():
        yield 1
        raise error

    with pytest.raises(ValueError) as raised:
        with pipeline.Prefetch(source(), lambda x: x) as values:
            assert values.next() == 1
            values.next()
    assert raised.value is error
    assert "source" in [frame.name for frame in raised.traceback]
    assert threads() == []


def test_an_error_in_the_loop_ends_the_thread_and_closes_the_reader():
    closed = []

    def source():
        try:
            yield from itertools.count()
        finally:
            closed.append(True)

    with pytest.raises(KeyboardInterrupt):
        with pipeline.Prefetch(source(), lambda x: x) as values:
            values.next()
            raise KeyboardInterrupt
    assert threads() == [] and closed == [True]


def test_only_an_idle_device_waits():
    gate = threading.Event()

    def source():
        yield 0
        gate.wait()
        yield 1
        gate.wait()
        yield 2

    with pipeline.Prefetch(source(), lambda x: x) as values:
        values.next()
        before, busy = values.waited, Result(False)
        timer = threading.Timer(0.05, gate.set)
        timer.start()
        values.next(busy)
        assert values.waited == before, "the device still computed"
    gate.clear()
    with pipeline.Prefetch(source(), lambda x: x) as values:
        values.next()
        before, idle = values.waited, Result(True)
        timer = threading.Timer(0.05, gate.set)
        timer.start()
        values.next(idle)
        assert values.waited > before


def test_data_wait_is_a_share_of_the_time(tiny):
    meter = throughput.Meter(tiny.cfg, 2, 1)
    meter.wait(1e6)
    assert meter.read()["data_wait"] == 1.0
    assert meter.read()["data_wait"] == 0.0


def test_a_share_of_the_rows_stands_for_all(tiny):
    batch = {"encoder_ids": np.ones((2, 4), int), "targets": np.ones((2, 2), int)}
    half, whole = throughput.Meter(tiny.cfg, 2, 1, 0.5), throughput.Meter(tiny.cfg, 2, 1)
    half.add(batch)
    whole.add({k: np.concatenate([x, x]) for k, x in batch.items()})
    half._began = whole._began = time.perf_counter() - 1000
    assert half.read()["tokens_per_second"] == pytest.approx(
        whole.read()["tokens_per_second"], rel=1e-2
    )


def test_a_readers_error_ends_training_as_itself(tiny, pairs):
    def batches(start):
        yield next(batches_of(tiny, pairs, 5)(start))
        raise ValueError("the disk is gone")

    with pytest.raises(ValueError, match="^the disk is gone$"):
        fit(tiny, pairs, 4, batches=batches)
    assert threads() == []


def test_each_process_makes_its_rows_of_the_same_batches(tiny, pairs):
    from softprompt import data, packing, prompted

    examples = data.from_pairs(pairs, tiny.vocabulary, {"inputs": 16, "targets": 8})
    slots = prompted.slots(tiny.cfg.vocab_size, 5)
    for make in (
        lambda own: data.train_batches([examples], [1.0], 8, 0, slots, own),
        lambda own: packing.Packing([examples], [1.0], 16, 0, slots, 48, 2, own),
    ):
        whole = make(slice(None))
        count = len(next(whole(0))["targets"])
        halves = [make(slice(0, count // 2)), make(slice(count // 2, count))]
        for batch, *parts in itertools.islice(zip(whole(3), *(h(3) for h in halves)), 3):  # noqa: B905
            for name, x in batch.items():
                np.testing.assert_array_equal(x, np.concatenate([p[name] for p in parts]))


def test_reading_ahead_changes_no_bit(tiny, pairs, monkeypatch):
    ahead = fit(tiny, pairs, 3)

    class Inline:
        waited = 0.0

        def __init__(self, batches, place):
            self.batches, self.place = batches, place

        def next(self, last=None):
            return self.place(next(self.batches))

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731

    monkeypatch.setattr(pipeline, "Prefetch", Inline)
    inline = fit(tiny, pairs, 3)
    assert bits(ahead.trained) == bits(inline.trained) and train.PROMPT in ahead.trained
