"""Packing: whole examples behind their prompts, full rows, any step to start from."""

import itertools

import numpy as np
import pytest

from softprompt import data, inputs, packing, partition


def packed_rows(parts, length=64, batch_size=8, prompt=5, **settings):
    slots = np.arange(1000, 1000 + prompt, dtype=np.int32)
    return packing.Packing(parts, [1.0] * len(parts), batch_size, 0, slots, length, **settings)


def random_examples(name, count, low, high, seed=0):
    rng = np.random.default_rng(seed)
    inputs = [rng.integers(3, 900, rng.integers(low, high)) for _ in range(count)]
    targets = [rng.integers(3, 900, rng.integers(1, 4)) for _ in range(count)]
    lengths = {"inputs": high + 1, "targets": 8}
    return data.make_examples(name, inputs, targets, [{}] * count, lengths)


def test_packed_rows_hold_whole_examples_each_behind_its_prompt():
    part = random_examples("a", 40, 2, 30)
    packed = packed_rows([part])
    known = {tuple(x): tuple(y) for x, y in zip(part.inputs, part.targets, strict=True)}
    for batch in itertools.islice(packed(0), 5):
        assert batch["encoder_ids"].shape == packed.shape[:2]
        for row in range(packed.shape[0]):
            numbers = set(batch["encoder_segments"][row]) - {0}
            assert numbers == set(batch["decoder_segments"][row]) - {0} and len(numbers) > 1
            for number in numbers:
                ids = batch["encoder_ids"][row][batch["encoder_segments"][row] == number]
                targets = batch["targets"][row][batch["decoder_segments"][row] == number]
                np.testing.assert_array_equal(ids[:5], packed.slots)
                assert known[tuple(ids[5:])] == tuple(targets)


def test_packing_goes_on_from_any_step_and_leaves_no_example_out():
    part = random_examples("a", 50, 2, 30)
    packed = packed_rows([part])
    from_start = list(itertools.islice(packed(0), 12))
    for a, b in zip(from_start[7:], packed(7), strict=False):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    rows = itertools.islice(packed.rows(), 60)
    taken = np.bincount([i for batch in rows for row in batch for _, i in row], minlength=50)
    assert taken.min() >= taken.max() - 2, "every example as often as any other"


@pytest.mark.parametrize("low, high, prompt, length", [(20, 60, 100, 1024), (30, 300, 100, 896)])
def test_rows_are_nine_tenths_full(low, high, prompt, length):
    part = random_examples("a", 400, low, high)
    packed = packed_rows([part], length, 32, prompt)
    share, count = packed.fill()
    assert share >= 0.9 and 0.8 * 32 <= count <= 1.25 * 32


def test_a_row_too_short_for_an_example_is_refused():
    with pytest.raises(ValueError, match="PACK_LENGTH is 20, but .* has 3[0-9] tokens"):
        packed_rows([random_examples("a", 40, 2, 30)], 20)


def test_rows_longer_than_a_batch_are_filled_and_said(capsys):
    part = random_examples("a", 400, 10, 60)
    mesh = partition.make_mesh(devices=1)
    slots = np.arange(1000, 1020, dtype=np.int32)
    packed = inputs.batches([part], [1.0], 2, 0, slots, mesh, pack_length=1024)
    share, count = packed.fill()
    assert share >= 0.9 and count > 15
    assert " times BATCH_SIZE 2; shorter rows (PACK_LENGTH)" in capsys.readouterr().out


def test_the_row_length_found_keeps_to_the_batch_size():
    """Eight data partitions: short rows, fuller ones would hold twice as many examples."""
    slots = np.arange(1000, 1100, dtype=np.int32)
    drawing = ([random_examples("a", 400, 30, 312)], [1.0], 16, 0, slots)
    found = packing.row_length(*drawing, 8)
    _, count = packing.Packing(*drawing, found, 8).fill()
    assert count < 1.25 * 16
    assert packing.Packing(*drawing, packing.row_length(*drawing), 8).fill()[1] > 1.25 * 16


@pytest.mark.parametrize("low, high", [(15, 82), (30, 312), (40, 512)])
def test_the_row_length_found_is_full_and_short(low, high):
    slots = np.arange(1000, 1100, dtype=np.int32)
    drawing = ([random_examples("a", 400, low, high)], [1.0], 16, 0, slots)
    found = packing.row_length(*drawing)
    share, _ = packing.Packing(*drawing, found).fill()
    assert share > 0.9 and found <= 2.5 * (100 + high)
