"""Similarity of prompts by hand, and the choice of the one to start from."""

import jax
import numpy as np
import pytest

from softprompt import prompt, similarity

KEY = jax.random.key(0)


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_both_measures_are_their_definitions(rng):
    a, b = rng.normal(size=(4, 6)).astype("f4"), rng.normal(size=(7, 6)).astype("f4")
    pairs = [cosine(x, y) for x in a for y in b]
    assert similarity.per_token_cosine(a, b) == pytest.approx(np.mean(pairs), abs=1e-6)
    assert similarity.average_cosine(a, b) == pytest.approx(cosine(a.mean(0), b.mean(0)), abs=1e-6)
    assert similarity.average_cosine(a, 3 * a) == pytest.approx(1)
    assert similarity.average_cosine(a, -a) == pytest.approx(-1)
    assert similarity.average_cosine(a, 0 * a) == 0
    one = a[:1]
    assert similarity.per_token_cosine(one, 5 * one) == pytest.approx(1)
    assert similarity.per_token_cosine(a, a) < 1, "different vectors within a prompt count too"


def test_a_matrix_holds_every_pair(rng):
    prompts = [rng.normal(size=(p, 5)) for p in (2, 3, 4)]
    for name, measure in similarity.MEASURES.items():
        found = similarity.matrix(prompts, name)
        np.testing.assert_allclose(found, found.T, atol=1e-12)
        assert found[0, 2] == measure(prompts[0], prompts[2])
    with pytest.raises(ValueError, match="SIMILARITY is 'dot', expected one of average, per_token"):
        similarity.matrix(prompts, "dot")
    with pytest.raises(ValueError, match="different widths"):
        similarity.matrix([np.ones((2, 3)), np.ones((2, 4))])


def test_training_starts_from_the_most_similar_candidate(tiny, rng, tmp_path, capsys):
    width = tiny.cfg.emb_dim
    ours = {"backbone": "tiny", "backbone_fingerprint": tiny.fingerprint}
    source = prompt.Source(np.zeros((9, width), np.float32), backbone=tiny)
    trial = rng.normal(size=(3, width)).astype("f4")
    arrays = {"far": -trial, "near": trial + 0.1, "other": rng.normal(size=(3, width))}
    for name, array in arrays.items():
        prompt.save(tmp_path / f"c_{name}.safetensors", array, ours)
    prompt.save(tmp_path / "trial.safetensors", trial[:2], ours)
    choose = lambda **settings: similarity.most_similar(  # noqa: E731
        KEY, 3, source,
        **{"candidates": str(tmp_path / "c_*"), "trial": tmp_path / "trial.safetensors"} | settings,
    )  # fmt: skip
    for measure in similarity.MEASURES:
        np.testing.assert_array_equal(choose(measure=measure), arrays["near"])
    noted = source.origin
    assert noted["initialised_from"].endswith("c_near.safetensors")
    assert list(noted["similarities"])[0] == noted["initialised_from"]
    assert len(noted["similarities"]) == 3
    said = capsys.readouterr().out
    assert "starting from" in said and "c_near.safetensors, similarity +" in said
    assert said.count("similarity -") == 2, "the far one, once by each measure"
    named = [tmp_path / "c_far.safetensors", tmp_path / "c_other.safetensors"]
    np.testing.assert_array_equal(choose(candidates=named), arrays["other"].astype("f4"))

    with pytest.raises(ValueError, match="PROMPT_FILES: no file matches '.*none"):
        choose(candidates=str(tmp_path / "none*"))
    with pytest.raises(ValueError, match="PROMPT_FILES names no prompt"):
        choose(candidates=[])
    theirs = {"backbone": "large", "backbone_fingerprint": "0123456789abcdef"}
    prompt.save(tmp_path / "c_theirs.safetensors", trial, theirs)
    with pytest.raises(ValueError, match="c_theirs.*trained for the backbone 'large'"):
        choose()
    np.testing.assert_array_equal(choose(ignore_fingerprint=True), trial)
    (tmp_path / "c_theirs.safetensors").unlink()
    prompt.save(tmp_path / "c_short.safetensors", trial[:2], ours)
    with pytest.raises(ValueError, match=r"c_short.*has shape \(2, 24\), expected \(3, 24\)"):
        choose()


def test_a_file_of_another_backbone_is_no_start(tiny, tmp_path):
    width = tiny.cfg.emb_dim
    source = prompt.Source(np.zeros((9, width), np.float32), backbone=tiny)
    path, array = tmp_path / "p.safetensors", np.ones((3, width), np.float32)
    prompt.save(path, array, {"backbone": "large", "backbone_fingerprint": "0123456789abcdef"})
    with pytest.raises(ValueError, match="trained for the backbone 'large'.*--ignore_fingerprint"):
        prompt.file(KEY, 3, source, path)
    np.testing.assert_array_equal(prompt.file(KEY, 3, source, path, True), array)
    prompt.save(path, array, {"backbone_fingerprint": tiny.fingerprint})
    np.testing.assert_array_equal(prompt.file(KEY, 3, source, path), array)
