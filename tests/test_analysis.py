"""What `softprompt analyse` finds in prompts that were made to show it."""

import json
import re

import numpy as np
import pytest

from softprompt import analysis, portrait, prompt
from softprompt.__main__ import main
from softprompt.analysis import Named
from softprompt.formats import prompts


@pytest.fixture(scope="session")
def words(embedded):
    return analysis.words_in(embedded)


def named(array, name="p", initial=None, **metadata):
    return Named(name, name, np.asarray(array, np.float32), metadata, initial)


def rows_of(words, *texts):
    """The mean embedding of each text's tokens."""
    return np.stack([words.embedding[words.vocabulary.encode(t)].mean(0) for t in texts])


# --- neighbours ---------------------------------------------------------------------------------


def test_nearest_tokens_by_distance_differ_from_those_by_cosine():
    embedding = np.array([[1, 0], [10, 1], [0, 3]], np.float32)
    array = np.array([[9, 0]], np.float32)
    ids, cosines = analysis.nearest_tokens(array, embedding, 2)
    assert ids.tolist() == [[0, 1]] and cosines[0, 0] == 1
    ids, distances = analysis.nearest_tokens(array, embedding, 2, "euclidean")
    assert ids.tolist() == [[1, 0]]
    np.testing.assert_allclose(distances, [[2**0.5, 8]], rtol=1e-5)


def test_positions_that_share_half_of_their_tokens_are_a_group():
    ids = np.array([[1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 8], [20, 21, 22, 23], [1, 30, 31, 32]])
    assert analysis.groups(ids) == [[0, 1, 2]]


def test_tokens_of_one_direction_are_a_cluster(rng):
    ways = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    embedding = np.repeat(ways, [3, 2, 1, 1, 1, 1, 1, 1], axis=0)
    embedding = embedding + 0.01 * rng.normal(size=embedding.shape)
    found = analysis.token_clusters(range(11), embedding, 0.5)
    assert found == [[0, 1, 2], [3, 4]]
    assert analysis.token_clusters([5], embedding, 0.5) == []


def test_random_tokens_are_less_alike_than_neighbours(words):
    usual, limit = analysis.chance(words.embedding)
    assert usual < 0.1 < limit < 0.8
    facts = analysis.analyse([named(rows_of(words, "person", "time"))], words)
    [prompt] = facts["prompts"]
    assert prompt["cosine_among_neighbours"] > usual + 0.1
    assert prompt["positions"][0]["neighbours"][0] == {
        "token": "▁person",
        "id": words.vocabulary.encode("person")[0],
        "cosine": 1.0,
    }


# --- labels, drift, similarity ------------------------------------------------------------------


def test_labels_persist_where_they_started_and_only_there(words, rng):
    labels = ["person", "not_entailment", "time"]
    array = rows_of(words, *labels)
    assert len(words.vocabulary.encode("not_entailment")) > 1, "a label of several tokens"
    array = array + 0.1 * rng.normal(size=array.shape)
    array[2] = rng.normal(size=array.shape[1])
    found = analysis.labels_found(array, labels, words, 5, initialised=True)
    assert [e["persists"] for e in found] == [True, True, False]
    assert [e["positions"] for e in found] == [[0], [1], []]
    assert found[2]["rank_there"] > 5 and found[2]["initialised_at"] == 2


def test_labels_are_looked_for_everywhere_after_another_initialisation(words):
    array = rows_of(words, "time", "time", "place")
    [found] = analysis.labels_found(array, ["time"], words, 1, initialised=False)
    assert found["positions"] == [0, 1] and "persists" not in found


def test_the_labels_are_those_that_the_prompt_names(words):
    about = {"class_labels": ["person"], "initialisation": "class_labels"}
    [own] = analysis.analyse([named(rows_of(words, "person"), **about)], words)["prompts"]
    assert own["labels"][0]["persists"]
    [given] = analysis.analyse([named(rows_of(words, "person"), **about)], words, labels=["time"])[
        "prompts"
    ]
    assert [e["label"] for e in given["labels"]] == ["time"]


def test_drift_is_length_and_angle():
    l2, cosine = analysis.drift(np.array([[3.0, 0], [1, 1]]), np.array([[3.0, 4], [2, 2]]))
    np.testing.assert_allclose(l2, [4, 2**0.5])
    np.testing.assert_allclose(cosine, [0.6, 1.0])


def test_similarity_of_prompts_of_different_lengths(rng):
    a = rng.normal(size=(4, 6))
    b = np.concatenate([a[::-1], -a[:1]])
    found = analysis.similarity([a, b])
    unit = lambda x: x / np.linalg.norm(x)  # noqa: E731
    np.testing.assert_allclose(found["mean_prompt"][0, 1], unit(a.mean(0)) @ unit(b.mean(0)))
    cosines = np.array([[unit(x) @ unit(y) for y in b] for x in a])
    best = (1 + (4 + cosines[:, 4].max()) / 5) / 2
    np.testing.assert_allclose(found["best_match"], [[1, best], [best, 1]])
    np.testing.assert_allclose(found["mean_position"][0, 1], cosines.mean())


# --- files and the command ----------------------------------------------------------------------


def test_what_a_prompt_started_from_is_found_beside_it(tmp_path, rng):
    start, end = rng.normal(size=(2, 3, 8)).astype(np.float32)
    folder = tmp_path / "run" / "prompts"
    prompt.save(folder / "initial.safetensors", start, {"step": 0})
    prompt.save(folder / "best.safetensors", end, {"step": 5})
    np.save(tmp_path / "other.npy", end)
    run, other = analysis.read([tmp_path / "run", tmp_path / "other.npy"])
    assert (run.name, other.name) == ("run", "other")
    assert np.array_equal(run.initial, start) and other.initial is None
    [other] = analysis.read([tmp_path / "other.npy"], folder / "initial.safetensors")
    assert np.array_equal(other.initial, start)
    np.save(tmp_path / "short.npy", end[:2])
    with pytest.raises(
        ValueError, match=r"--initial .* has shape \(2, 8\), the prompt .* \(3, 8\)"
    ):
        analysis.read([tmp_path / "other.npy"], tmp_path / "short.npy")


def test_a_folder_s_name_is_kept_whole_though_it_holds_a_point(tmp_path, rng):
    names = ["task-rate0.3-seed0", "task-rate0.1-seed0"]
    for name in names:
        path = tmp_path / name / "prompts" / "best.safetensors"
        prompts.write(path, rng.normal(size=(2, 8)).astype(np.float32), {})
    assert [p.name for p in analysis.read([tmp_path / name for name in names])] == names


def test_the_working_directory_is_called_by_its_name(tmp_path, rng, monkeypatch):
    path = tmp_path / "run" / "prompts" / "best.safetensors"
    prompts.write(path, rng.normal(size=(2, 8)).astype(np.float32), {})
    monkeypatch.chdir(tmp_path / "run")
    assert [p.name for p in analysis.read(["."])] == ["run"]
    monkeypatch.chdir(path.parent)
    assert [p.name for p in analysis.read([".."])] == ["run"]


def test_prompts_of_two_widths_are_refused(tmp_path, rng):
    for width in (8, 9):
        np.save(tmp_path / f"{width}.npy", rng.normal(size=(2, width)).astype(np.float32))
    with pytest.raises(ValueError, match="has width 8, .*9.npy' 9: they belong to different"):
        analysis.read([tmp_path / "8.npy", tmp_path / "9.npy"])


def test_the_command_writes_json_and_a_picture(tmp_path, words, capsys):
    array = rows_of(words, "person", "place")
    prompts.write_peft(tmp_path / "peft", array, {})
    np.save(tmp_path / "$x$.npy", array[::-1].astype(np.float32))
    out = tmp_path / "out"
    files = [str(tmp_path / "peft"), str(tmp_path / "$x$.npy")]
    assert main(["analyse", *files, "--backbone=embedded", f"--output_dir={out}",
                 "--labels=person", "--neighbours=2"]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "▁person 1.00" in said and "label person: among the nearest of positions 1" in said
    facts = json.loads((out / "analysis.json").read_text())
    assert facts["similarity"]["names"] == ["peft", "$x$"]
    assert facts["similarity"]["best_match"] == [[1, 1], [1, 1]]
    assert len(facts["prompts"][0]["positions"][0]["neighbours"]) == 2
    assert (out / "analysis.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--neighbours=0"], "--neighbours is 0, expected at least 1"),
        (["--backbone=/no"], "the backbone '/no' .* does not exist"),
        (["--backbone=embedded"], "has width 8, the backbone 't5_1_1_embedded' has 256"),
    ],
)
def test_bad_flags_are_a_sentence(tmp_path, capsys, flags, message):
    np.save(tmp_path / "p.npy", np.ones((2, 8), np.float32))
    assert main(["analyze", str(tmp_path / "p.npy"), f"--output_dir={tmp_path}", *flags]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and len(said.splitlines()) == 1


def test_published_prompts_are_compared_without_their_backbone(fixtures):
    files = sorted((fixtures / "prompts_t5_1_1_lm100k_base").glob("*.npy"))
    found = analysis.read(files)
    facts = analysis.analyse(found, analysis.words_for(found, None))
    assert facts["similarity"]["names"] == ["mrpc", "rte", "sst2"] and facts["backbone"] is None
    matrix = np.array(facts["similarity"]["mean_prompt"])
    # Prompts for one backbone look alike; no two of them point the same way.
    assert ((matrix > 0.3) & (matrix < 0.7)).sum() == 6
    assert "neighbours" not in facts["prompts"][0]["positions"][0]
    assert portrait.summary(facts)
