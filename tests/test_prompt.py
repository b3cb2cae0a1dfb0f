"""Initialisers of the paper, prompt files, and the fingerprint that ties one to a backbone."""

import jax
import numpy as np
import pytest

from softprompt import checkpoint, prompt

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def source(vocabulary):
    embedding = np.random.default_rng(0).normal(size=(8192, 6)).astype(np.float32)
    return prompt.Source(embedding, vocabulary, ["entailment", "not_entailment"])


def rows_of(array, source):
    """Id of the embedding row that each prompt row equals, -1 for none."""
    same = (array[:, None] == source.embedding[None]).all(-1)
    return np.where(same.any(1), same.argmax(1), -1)


def test_random_uniform_fills_plus_minus_one_half(source):
    array = prompt.random_uniform(KEY, 500, source)
    assert array.shape == (500, 6) and array.dtype == np.float32
    assert -0.5 <= array.min() < -0.45 and 0.45 < array.max() <= 0.5


def test_sampled_vocab_takes_different_rows_of_the_most_frequent(source):
    ids = rows_of(prompt.sampled_vocab(KEY, 100, source), source)
    assert (ids >= 0).all() and ids.max() < 5000 and len(set(ids)) == 100
    assert rows_of(prompt.sampled_vocab(KEY, 50, source, population_size=60), source).max() < 60
    other = rows_of(prompt.sampled_vocab(jax.random.key(1), 100, source), source)
    assert set(other) != set(ids)


def test_class_labels_are_averaged_and_the_rest_sampled(source):
    array = prompt.class_labels(KEY, 10, source)
    for i, label in enumerate(source.class_labels):
        ids = source.vocabulary.encode(label)
        np.testing.assert_allclose(array[i], source.embedding[ids].mean(0), rtol=1e-6)
    assert len(source.vocabulary.encode("not_entailment")) > 1
    assert (rows_of(array[2:], source) >= 0).all()


def test_more_labels_than_rows_keep_the_first(source):
    array = prompt.class_labels(KEY, 1, source)
    ids = source.vocabulary.encode("entailment")
    np.testing.assert_allclose(array, source.embedding[ids].mean(0)[None], rtol=1e-6)


def test_class_labels_without_labels_say_what_to_do(source):
    bare = prompt.Source(source.embedding, source.vocabulary)
    with pytest.raises(ValueError, match="needs CLASS_LABELS"):
        prompt.class_labels(KEY, 10, bare)


def test_text_comes_first_and_a_long_text_is_refused(source):
    array = prompt.text(KEY, 12, source, text="is this review good or bad")
    ids = source.vocabulary.encode("is this review good or bad")
    assert rows_of(array, source)[: len(ids)].tolist() == ids
    with pytest.raises(ValueError, match=f"has {len(ids)} tokens, the prompt 2"):
        prompt.text(KEY, 2, source, text="is this review good or bad")


def test_a_file_is_read_back_and_its_shape_checked(source, tmp_path):
    array = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)
    prompt.save(tmp_path / "p.safetensors", array, {"task": "x"})
    np.save(tmp_path / "p.npy", array)
    for name in ("p.safetensors", "p.npy"):
        np.testing.assert_array_equal(prompt.file(KEY, 4, source, tmp_path / name), array)
        with pytest.raises(ValueError, match=r"has shape \(4, 6\), expected \(5, 6\)"):
            prompt.file(KEY, 5, source, tmp_path / name)


def test_metadata_comes_back_and_equal_files_have_equal_bytes(tmp_path):
    metadata = {"task": "x", "metrics": {"accuracy": 1.5}, "seed": 0, "backbone": "b"}
    for name in "ab":
        prompt.save(tmp_path / f"{name}.safetensors", np.ones((2, 3), np.float32), metadata)
    _, found = prompt.load(tmp_path / "a.safetensors")
    assert {k: found[k] for k in metadata} == metadata
    content = [(tmp_path / f"{name}.safetensors").read_bytes() for name in "ab"]
    assert content[0] == content[1]


@pytest.mark.parametrize("name", ["p.npy", "p", "p.safetensor"])
def test_a_name_that_would_be_read_as_another_kind_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}', expected a name in .safetensors"):
        prompt.Prompt(np.ones((2, 3), np.float32), {}).save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_torn_altered_and_foreign_files_are_named(tmp_path):
    path = tmp_path / "p.safetensors"
    prompt.save(path, np.ones((2, 3), np.float32), {})
    whole = path.read_bytes()
    for broken in (whole[:50], whole[:-3], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(broken)
        with pytest.raises(checkpoint.CorruptFile, match="p.safetensors"):
            prompt.load(path)
    with pytest.raises(ValueError, match="no such file: .*nothing.safetensors"):
        prompt.load(tmp_path / "nothing.safetensors")
    checkpoint.write(path, {"other": np.ones(3, np.float32)}, {})
    with pytest.raises(ValueError, match="is no prompt: it holds other"):
        prompt.load(path)
    np.savez(tmp_path / "several.npz", a=np.ones(3))
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    with pytest.raises(checkpoint.CorruptFile, match="several.npy' is no NumPy array: it is an ar"):
        prompt.load(tmp_path / "several.npy")
    np.save(tmp_path / "p.npy", np.ones(3, np.float32))
    with pytest.raises(ValueError, match=r"shape \(3,\), expected floats \[P, H\]"):
        prompt.load(tmp_path / "p.npy")


def test_a_prompt_of_another_backbone_is_refused_unless_overridden(tiny):
    array = np.zeros((2, tiny.cfg.emb_dim), np.float32)
    ours = {"backbone": "tiny", "backbone_fingerprint": tiny.fingerprint}
    theirs = {"backbone": "large", "backbone_fingerprint": "0123456789abcdef"}
    prompt.check_backbone("p", array, ours, tiny)
    with pytest.raises(ValueError, match="trained for the backbone 'large' .*--ignore_fingerprint"):
        prompt.check_backbone("p", array, theirs, tiny)
    prompt.check_backbone("p", array, theirs, tiny, ignore_fingerprint=True)
    with pytest.raises(ValueError, match="has width 3, the backbone 'tiny' has 24"):
        prompt.check_backbone("p", array[:, :3], ours, tiny, ignore_fingerprint=True)


def test_published_prompts_load(fixtures):
    for path in sorted(fixtures.glob("prompts_*/*.npy")):
        array, metadata = prompt.load(path)
        assert array.shape == (100, 768) and metadata == {}
