"""Embeddings from co-occurrence counts."""

import json

import numpy as np
import pytest

from softprompt import cooccurrence
from softprompt.__main__ import main

EMBEDDING, HEAD = "token_embedder/embedding", "decoder/logits_dense/kernel"


def test_counts_weigh_pairs_by_their_distance():
    table = cooccurrence.counts([np.array([0, 1, 2, 1])], size=3, window=2)
    expected = np.zeros((3, 3))
    expected[0, 1], expected[1, 2], expected[2, 1] = 1, 1, 1
    expected[0, 2], expected[1, 1] = 0.5, 0.5
    np.testing.assert_allclose(table, expected)


def test_tokens_of_one_context_are_neighbours(rng):
    # Tokens 0 and 1 stand between 4s, tokens 2 and 3 between 5s.
    pairs = [(rng.integers(2), 4) if rng.random() < 0.5 else (2 + rng.integers(2), 5)
             for _ in range(2000)]  # fmt: skip
    ids = np.array([i for a, b in pairs for i in (b, a, b, 6)])
    rows = cooccurrence.embeddings(cooccurrence.counts([ids], size=8, window=1), width=4)
    np.testing.assert_allclose((rows**2).mean(1), 1, rtol=1e-5)
    cosines = rows @ rows.T / 4
    assert cosines[0, 1] > 0.9 and cosines[2, 3] > 0.9
    assert cosines[0, 2] < 0.5 and cosines[1, 3] < 0.5


def test_a_vocabulary_too_large_for_a_table_is_refused():
    with pytest.raises(ValueError, match="30000 pieces.*at most 20000"):
        cooccurrence.counts([], size=30_000)


def test_the_command_writes_what_a_backbone_starts_from(tmp_path, tiny, vocabulary, capsys):
    shard, output = tmp_path / "train.jsonl", tmp_path / "rows.npy"
    shard.write_text(json.dumps({"text": "a fine film of a fine town"}) + "\n")
    flags = ["embeddings", str(shard), f"--vocabulary_file={vocabulary.path}"]
    width = tiny.cfg.emb_dim
    assert main([*flags, f"--output={output}", f"--width={width}"]) == 0
    assert f"({vocabulary.size}, {width})" in capsys.readouterr().out
    rows = np.load(output)
    changed = cooccurrence.start_from(tiny.params, output)
    np.testing.assert_array_equal(changed[EMBEDDING][: len(rows)], rows)
    np.testing.assert_allclose(
        np.asarray(changed[HEAD])[:, : len(rows)], rows.T / np.sqrt(width), rtol=1e-6
    )
    assert {k for k in tiny.params if changed[k] is not tiny.params[k]} == {EMBEDDING, HEAD}
    np.save(output, rows[:, :-1])
    with pytest.raises(ValueError, match=f"EMBEDDINGS_FILE .* has shape .*expected .*{width}"):
        cooccurrence.start_from(tiny.params, output)
    output.write_bytes(b"")
    with pytest.raises(ValueError, match="EMBEDDINGS_FILE .* cannot be read"):
        cooccurrence.start_from(tiny.params, output)
    assert main([*flags, "--output=rows.txt", "--width=4"]) == 2
    assert "ends in .npy" in capsys.readouterr().err


def test_wrong_numbers_and_text_that_counts_nothing_are_refused(tmp_path, vocabulary):
    shard = tmp_path / "train.jsonl"
    shard.write_text("\n")
    output = tmp_path / "new" / "rows.npy"
    for inputs, settings, message in (
        (["/no"], {"width": 0}, "width is 0, expected an integer of at least 1"),
        (["/no"], {"width": 9000}, f"width is 9000, expected at most .* {vocabulary.size}"),
        (["/no"], {"window": 0}, "window is 0, expected an integer"),
        (["/no"], {"seed": -1}, "seed is -1, expected an integer"),
        ([shard], {}, "train.jsonl hold no text to count co-occurrences in"),
    ):
        with pytest.raises(ValueError, match=message):
            cooccurrence.make(inputs, vocabulary.path, output, **{"width": 4, **settings})
    assert not output.exists()
