"""Length buckets: few shapes, little padding, still a function of seed and step."""

import itertools

import numpy as np
import pytest

from softprompt import data, lengths

SLOTS = np.arange(1000, 1005, dtype=np.int32)


def made(count, low, high, seed=0, first=0):
    """Examples whose first token names them."""
    rng = np.random.default_rng(seed)
    inputs = [[first + 10 + i] * int(rng.integers(low, high)) for i in range(count)]
    return data.make_examples(
        "a", inputs, [[5]] * count, [{}] * count, {"inputs": high + 1, "targets": 4}
    )


def take(batches, start, count):
    return list(itertools.islice(batches(start), count))


def test_buckets_pad_least():
    """Against every choice of buckets."""
    found = np.random.default_rng(1).integers(1, 70, 40)
    rounded = {data.round_up(int(n)) for n in found}

    def padded(buckets):
        return sum(min(b for b in buckets if b >= n) for n in found)

    for count in (1, 2, 3):
        chosen = lengths.bucket_lengths(found, count)
        assert len(chosen) == count and chosen[-1] == max(rounded)
        others = itertools.combinations(sorted(rounded - {max(rounded)}), count - 1)
        assert padded(chosen) == min(padded([*some, max(rounded)]) for some in others)
    assert lengths.bucket_lengths([3, 5, 30], 2) == [8, 32]
    assert lengths.bucket_lengths([3, 5], 9) == [8]
    with pytest.raises(ValueError, match="got 0 buckets for 1 lengths"):
        lengths.bucket_lengths([3], 0)


def test_bucketed_batches_hold_every_example_once_an_epoch_in_few_shapes():
    part = made(64, 3, 90)
    batches = lengths.bucketed_batches([part], [1.0], 8, 0, SLOTS, 3)
    epoch = take(batches, 0, 8)
    rows = np.concatenate([np.pad(b["encoder_ids"], ((0, 0), (0, 95)))[:, :100] for b in epoch])
    assert sorted(rows[:, 5]) == list(range(10, 74))
    assert (rows[:, :5] == SLOTS).all()
    for row in rows:
        assert np.count_nonzero(row) == 5 + len(part.inputs[row[5] - 10])
    shapes = [b["encoder_ids"].shape[1] for b in take(batches, 0, 40)]
    assert len(set(shapes)) <= 3
    assert shapes[:8] != sorted(shapes[:8]), "lengths come in no order"
    bucketed, _ = lengths.padding(batches(0), 40)
    plain, _ = lengths.padding(data.train_batches([part], [1.0], 8, 0, SLOTS)(0), 40)
    assert bucketed > plain + 0.2


@pytest.mark.parametrize("start", [1, 7, 8, 21])
def test_bucketed_batches_go_on_from_any_step(start):
    parts = [made(60, 3, 40), made(30, 20, 90, first=200)]
    batches = lengths.bucketed_batches(parts, [2.0, 1.0], 8, 3, SLOTS, 3)
    for a, b in zip(take(batches, 0, 30)[start:], take(batches, start, 30), strict=False):
        np.testing.assert_array_equal(a["encoder_ids"], b["encoder_ids"])
        np.testing.assert_array_equal(a["targets"], b["targets"])


def test_no_example_meets_itself_in_a_small_data_set():
    batches = lengths.bucketed_batches([made(9, 3, 40)], [1.0], 4, 0, SLOTS, 2)
    for batch in take(batches, 0, 2):
        assert len(set(batch["encoder_ids"][:, 5])) == 4


def cost(cuts, prompt_length, evaluations):
    shapes = {(cut.rows, cut.length) for cut in cuts}
    padded = sum(cut.rows * (prompt_length + cut.length) + lengths.BATCH_COST for cut in cuts)
    return padded + len(shapes) * lengths.COMPILE_COST / evaluations


@pytest.mark.parametrize("evaluations", (1, 16, None))
def test_an_evaluation_has_every_example_once_in_few_shapes(evaluations):
    found = np.random.default_rng(2).integers(1, 700, 1001)
    cuts = lengths.cuts(found, 32, 100, 4, evaluations)
    assert sorted(np.concatenate([cut.indices for cut in cuts])) == list(range(1001))
    shortest = [found[cut.indices].min() for cut in cuts]
    assert shortest == sorted(shortest)
    for cut in cuts:
        assert 0 < len(cut.indices) <= cut.rows <= 32 and cut.rows % 4 == 0
        assert found[cut.indices].max() <= cut.length
    shapes = {(cut.rows, cut.length) for cut in cuts}
    fixed = lengths.cuts(found, 32, 100, 4, None)
    if evaluations is None:
        assert shapes <= {(32, n) for n in lengths.FIXED_LENGTHS}
    else:
        assert 1 < len(shapes) <= lengths.EVAL_SHAPES
        assert cost(cuts, 100, evaluations) < 0.95 * cost(fixed, 100, evaluations)
    assert lengths.cuts([], 32, 100, 4, evaluations) == []


def test_what_is_evaluated_once_compiles_fewer_shapes():
    found = np.random.default_rng(2).integers(1, 700, 1001)
    once, often = ({cut.length for cut in lengths.cuts(found, 32, 100, 1, n)} for n in (1, 16))
    assert len(once) < len(often)
    # A few texts: one shape, no larger than they are.
    [cut] = lengths.cuts([3, 90, 12], 32, 100)
    assert cut.rows == 3 and cut.length == 92


@pytest.mark.parametrize("evaluations", (16, 80, 10**6))
def test_no_other_shapes_of_an_evaluation_cost_less(evaluations):
    """Against every way to cut the sorted lengths into runs."""
    found = np.sort(np.random.default_rng(3).integers(1, 9, 60) ** 3)
    least = np.inf
    values = np.unique(found)
    for count in range(1, len(values) + 1):
        for inner in itertools.combinations(values[:-1], count - 1):
            cuts, begun = [], 0
            for end in np.searchsorted(found, [*inner, values[-1]], "right"):
                n = end - begun
                batches = -(-n // 8)
                rows = data.round_up(-(-n // batches), 2)
                length = data.round_up(int(found[end - 1]), lengths.EVAL_MULTIPLE)
                cuts += [lengths.Cut(np.zeros(0), rows, length)] * batches
                begun = end
            least = min(least, cost(cuts, 20, evaluations))
    cuts = lengths.cuts(found, 8, 20, 2, evaluations)
    assert cost(cuts, 20, evaluations) == least
    assert len({cut.length for cut in cuts}) > 1


def test_a_batch_of_an_evaluation_holds_its_examples():
    examples = made(5, 3, 20)
    slots = [SLOTS[: 1 + i % 2] for i in range(5)]
    cut = lengths.Cut(np.array([3, 0]), 4, 24)
    [(indices, batch)] = lengths.eval_batches(examples, [cut], slots, 3)
    assert indices is cut.indices
    assert batch["encoder_ids"].shape == (4, 27)
    for row, i in zip(batch["encoder_ids"], cut.indices, strict=False):
        expected = [*slots[i], *examples.inputs[i]]
        assert row[row > 0].tolist() == list(expected)
    assert not batch["encoder_ids"][2:].any() and not batch["targets"][2:].any()
    assert (batch["targets"][:2, 0] == 5).all()


@pytest.mark.parametrize("count", [41, 50])
def test_no_example_meets_itself_where_a_window_spans_the_end_of_an_epoch(count):
    batches = lengths.bucketed_batches([made(count, 3, 40)], [1.0], 8, 0, SLOTS, 2)
    found = [set(batch["encoder_ids"][:, 5]) for batch in take(batches, 0, 60)]
    assert min(map(len, found)) >= 7
    assert sum(len(names) < 8 for names in found) <= 6
    # Each still comes as often as all others, but for the epoch that has begun.
    seen = np.concatenate([batch["encoder_ids"][:, 5] for batch in take(batches, 0, count)])
    assert set(np.unique(seen, return_counts=True)[1]) <= {7, 8, 9}
