"""A population ends where each of its prompts ends alone."""

import dataclasses
import itertools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from test_train import Killed, killed_before_its_prompts

from softprompt import backbone as backbones
from softprompt import (
    checkpoint,
    data,
    eval_task,
    lengths,
    optim,
    partition,
    population,
    prompt,
    prompted,
    selection,
    train,
)
from softprompt.population import Member

LENGTHS = {"inputs": 32, "targets": 8}
# One layer each: what compiles is small.
SMALL = dataclasses.replace(TINY, num_encoder_layers=1, num_decoder_layers=1)


@pytest.fixture(scope="module")
def tiny(vocabulary):
    return backbones.random(SMALL, 0, vocabulary, partition.make_mesh(devices=1), "small")


TOPICS = [(f"about {word} and more of it", label) for word, label in (
    ("rain", "weather"), ("goals", "sport"), ("snow", "weather"), ("votes", "politics"),
    ("teams", "sport"), ("laws", "politics"),
)]  # fmt: skip


def member(backbone, pairs, labels, name, loss="tokens", seed=0, length=5, rate=0.3, **settings):
    """The arguments of `train.fit`, as a member."""
    examples = data.from_pairs(pairs, backbone.vocabulary, LENGTHS)
    slots = prompted.slots(backbone.cfg.vocab_size, length)
    start = np.random.default_rng(seed).uniform(-0.5, 0.5, (length, backbone.cfg.emb_dim))
    schedule = optim.warmup_linear(rate, 20)
    return Member(
        name=name,
        batches=data.train_batches([examples], [1.0], 4, seed, slots),
        optimizer=optim.adafactor(schedule),
        prompt=start.astype(np.float32),
        seed=seed,
        label_ids=eval_task.training_labels(loss, [examples], [labels], backbone.vocabulary),
        **{"train_steps": 3, "log_period": 2, **settings},
    )


def alone(backbone, one):
    settings = {f.name: getattr(one, f.name) for f in dataclasses.fields(one)}
    del settings["name"]
    return train.fit(backbone, **settings)


def assert_same(outcome, expected):
    np.testing.assert_allclose(
        outcome.result.trained[train.PROMPT], expected.trained[train.PROMPT], atol=2e-5
    )
    np.testing.assert_allclose(
        outcome.result.best[train.PROMPT], expected.best[train.PROMPT], atol=2e-5
    )
    assert (outcome.result.step, outcome.result.best_step, outcome.result.metrics) == (
        expected.step,
        expected.best_step,
        expected.metrics,
    )


@pytest.mark.slow
def test_every_member_ends_as_it_does_alone(tiny, pairs):
    """Seeds, rates, lengths, tasks with other labels, both losses, other numbers of steps."""
    two, three = ["positive", "negative"], ["weather", "sport", "politics"]
    members = [
        member(tiny, pairs, two, "a", seed=0),
        member(tiny, pairs, two, "b", seed=1, length=3, rate=0.1, train_steps=2),
        member(tiny, TOPICS, three, "c", length=7),
        member(tiny, pairs, two, "d", loss="labels"),
        member(tiny, TOPICS, three, "e", loss="labels", seed=2, length=2, train_steps=4),
    ]
    found = population.fit(tiny, members)
    assert [outcome.name for outcome in found] == ["a", "b", "c", "d", "e"]
    for one, outcome in zip(members, found, strict=True):
        assert outcome.status == population.FINISHED
        expected = alone(tiny, one)
        assert_same(outcome, expected)
        assert np.abs(expected.trained[train.PROMPT] - one.prompt).max() > 0.05


def test_members_of_one_shape_draw_the_dropout_they_draw_alone(vocabulary, pairs):
    cfg = dataclasses.replace(SMALL, dropout_rate=0.2)
    mesh = partition.make_mesh(devices=1)
    backbone = backbones.random(cfg, 0, vocabulary, mesh)
    members = [member(backbone, pairs, None, str(seed), seed=seed) for seed in (0, 1)]
    for one, outcome in zip(members, population.fit(backbone, members), strict=True):
        assert_same(outcome, alone(backbone, one))


WORDS = "rain goals snow votes teams laws storms games courts clouds".split()
UNEVEN = [(" ".join([word] * n), "positive" if n % 2 else "negative")
          for n, word in enumerate(WORDS * 2, 1)]  # fmt: skip


def bucketed(backbone, name, seed, length, **settings):
    """A member whose batches are of three lengths."""
    one = member(backbone, UNEVEN, ["positive", "negative"], name, seed=seed, length=length,
                 **{"train_steps": 6, **settings})  # fmt: skip
    examples = data.from_pairs(UNEVEN, backbone.vocabulary, LENGTHS)
    slots = prompted.slots(backbone.cfg.vocab_size, length)
    batches = lengths.bucketed_batches([examples], [1.0], 4, seed, slots, 3)
    return dataclasses.replace(one, batches=batches)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_members_in_length_buckets_end_as_they_do_alone(vocabulary, dropout):
    cfg = dataclasses.replace(SMALL, dropout_rate=dropout)
    backbone = backbones.random(cfg, 0, vocabulary, partition.make_mesh(devices=1))
    members = [bucketed(backbone, "a", 2, 5), bucketed(backbone, "b", 4, 3)]
    widths = [
        [x["encoder_ids"].shape[1] for x in itertools.islice(one.batches(0), 6)] for one in members
    ]
    assert max(max(x) for x in widths) > max(x[0] for x in widths), "later ones are longer"
    for one, outcome in zip(members, population.fit(backbone, members), strict=True):
        assert_same(outcome, alone(backbone, one))


def test_a_member_in_length_buckets_catches_up_to_the_same_bits(tiny, tmp_path):
    def made(folder, steps):
        return [
            bucketed(tiny, name, seed, 5, train_steps=n, model_dir=tmp_path / folder / name)
            for (seed, name), n in zip(enumerate("ab"), steps, strict=True)
        ]

    whole = population.fit(tiny, made("whole", [6, 6]))
    population.fit(tiny, made("cut", [6, 6]))
    # One of them is where a kill left it.
    checkpoints = tmp_path / "cut" / "b" / "checkpoints"
    for path in checkpoints.glob("*.safetensors"):
        path.unlink()
    again = population.fit(tiny, made("cut", [6, 6]))
    for one, other in zip(whole, again, strict=True):
        assert one.result.trained[train.PROMPT].tobytes() == (
            other.result.trained[train.PROMPT].tobytes()
        )


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_members_that_go_on_go_together_as_from_the_start(vocabulary, tmp_path, dropout):
    cfg = dataclasses.replace(SMALL, dropout_rate=dropout)
    backbone = backbones.random(cfg, 0, vocabulary, partition.make_mesh(devices=1))
    members = [bucketed(backbone, str(seed), seed, 1) for seed in range(3)]

    def groups(start):
        runs = []
        for one in members:
            one = dataclasses.replace(one, model_dir=tmp_path / str(start) / one.name)
            if start:
                state = {**population._Run(one, backbone).state, "step": jnp.int32(start)}
                about = {"best": selection.UNJUDGED, "identity": {}}
                checkpoint.save_state(one.model_dir, state, about, 1)
            runs.append(population._Run(one, backbone))
        assert {run.step for run in runs} == {start}
        return [[run.member.name for run in g.runs] for g in population._grouped(runs, backbone)]

    assert groups(2) == groups(0) == [["0", "1"], ["2"]]


def test_a_member_that_is_at_its_end_already_is_evaluated_if_it_never_was(tiny, pairs, tmp_path):
    def made(steps, evaluate):
        return member(
            tiny, pairs, None, "a", train_steps=steps, model_dir=tmp_path, checkpoint_period=2,
            evaluate=evaluate, save=prompt.saver({}, None),
        )  # fmt: skip

    def killing(flat, step):
        raise Killed

    calls = []
    with pytest.raises(Killed):
        population.fit(tiny, [made(3, killing)])
    for _ in range(2):
        judge = lambda flat, step: calls.append(step) or {"accuracy": 5.0}  # noqa: E731
        [found] = population.fit(tiny, [made(3, judge)])
        assert (found.result.best_step, found.result.metrics) == (3, {"accuracy": 5.0})
    assert calls == [3] and (tmp_path / "prompts" / "best.safetensors").is_file()


def test_patience_and_the_best_step_are_each_members_own(tiny, pairs):
    def judge(figures):
        left = iter(figures)
        return lambda flat, step: {"accuracy": next(left)}

    made = lambda name, figures: member(  # noqa: E731
        tiny, pairs, None, name, train_steps=8, eval_period=2, patience=1, evaluate=judge(figures)
    )
    found = population.fit(tiny, [made("a", [5.0, 4.0]), made("b", [1.0, 2.0, 3.0, 2.5])])
    assert [(o.status, o.result.step, o.result.best_step) for o in found] == [
        (population.EARLY, 4, 2),
        (population.FINISHED, 8, 6),
    ]
    expected = alone(tiny, member(tiny, pairs, None, "a", train_steps=2))
    np.testing.assert_allclose(
        found[0].result.best[train.PROMPT], expected.trained[train.PROMPT], atol=2e-5
    )


def test_one_that_diverges_ends_alone(tiny, pairs):
    broken = dataclasses.replace(
        member(tiny, pairs, None, "broken"), optimizer=optim.adafactor(lambda step: jnp.nan)
    )
    good = member(tiny, pairs, None, "good")
    found = population.fit(tiny, [broken, good])
    assert [o.status for o in found] == [population.DIVERGED, population.FINISHED]
    assert np.isfinite(found[0].result.trained[train.PROMPT]).all()
    assert_same(found[1], alone(tiny, good))


def test_stopped_and_killed_it_ends_as_if_it_had_not_been_and_leaves_what_single_runs_leave(
    tiny, pairs, tmp_path
):
    def save(path, trained, note):
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(f"{path}.npy", trained[train.PROMPT])

    def made(folder, kill=None, terminate=None):
        def evaluate(flat, step):
            if step == kill:
                raise Killed
            if step == terminate:
                os.kill(os.getpid(), signal.SIGTERM)
            return {"accuracy": float(np.asarray(flat[train.PROMPT]).mean())}

        return [
            member(
                tiny, pairs, None, str(seed), seed=seed, train_steps=6, eval_period=2, log_period=2,
                checkpoint_period=1 + seed, model_dir=tmp_path / folder / str(seed), save=save,
                evaluate=evaluate,
            )
            for seed in (0, 1)
        ]  # fmt: skip

    whole = population.fit(tiny, made("whole"))
    stopped = population.fit(tiny, made("killed", terminate=2))
    assert [(o.status, o.result.step) for o in stopped] == [(population.INTERRUPTED, 2)] * 2
    with pytest.raises(Killed):
        population.fit(tiny, made("killed", kill=4))
    again = population.fit(tiny, made("killed"))
    for a, b in zip(whole, again, strict=True):
        for which in ("trained", "best"):
            one, two = getattr(a.result, which), getattr(b.result, which)
            assert one[train.PROMPT].tobytes() == two[train.PROMPT].tobytes()
        assert (a.result.best_step, a.result.metrics) == (b.result.best_step, b.result.metrics)
    found = {
        folder: {
            str(p.relative_to(tmp_path / folder)): p.read_bytes()
            for p in (tmp_path / folder).rglob("*")
            if p.suffix in (".npy", ".jsonl")
        }
        for folder in ("whole", "killed")
    }
    assert found["whole"] == found["killed"]
    single = tmp_path / "single"
    alone(tiny, dataclasses.replace(made("x")[0], model_dir=single))
    names = lambda folder: {  # noqa: E731
        str(p.relative_to(folder)) for p in folder.rglob("*") if "events" not in str(p)
    }
    assert names(tmp_path / "whole" / "0") == names(single)
    losses = [
        json.loads(line)["loss"] for line in (single / "train.jsonl").read_text().splitlines()
    ]
    mine = found["whole"]["0/train.jsonl"].decode().splitlines()
    np.testing.assert_allclose([json.loads(line)["loss"] for line in mine], losses, rtol=1e-5)
    # Either goes on with what the other left: here there is nothing left to do.
    assert alone(tiny, made("whole")[0]).step == 6


def test_killed_before_its_prompt_a_member_without_evaluation_can_be_finished(
    tiny, pairs, tmp_path, monkeypatch
):
    write, killed, steps = killed_before_its_prompts(monkeypatch)
    one = member(tiny, pairs, None, "a", train_steps=1, model_dir=tmp_path, save=write)
    with pytest.raises(Killed):
        population.fit(tiny, [dataclasses.replace(one, save=killed)])
    [again] = population.fit(tiny, [one])
    saved, _ = prompt.load(tmp_path / "prompts" / "best.safetensors")
    np.testing.assert_array_equal(saved, again.result.trained[train.PROMPT])
    assert steps == [1], "written once"
    with checkpoint.locked(tmp_path), pytest.raises(ValueError, match="another run is writing"):
        population.fit(tiny, [one])
    with pytest.raises(ValueError, match="another run is writing"):
        population.fit(tiny, [one, dataclasses.replace(one, name="b")])


def test_mistakes_are_sentences(tiny, pairs):
    one = member(tiny, pairs, None, "a")
    with pytest.raises(ValueError, match="two members of the population have the name a"):
        population.fit(tiny, [one, one])
    with pytest.raises(ValueError, match=r"a: the prompt has shape \(5, 3\), expected \(P, 24\)"):
        population.fit(tiny, [dataclasses.replace(one, prompt=np.zeros((5, 3), np.float32))])
    with pytest.raises(ValueError, match="tunes plain prompts.*got TRAINABLE .*no prompt"):
        Member.of("a", {"prompt": None, "trainable": (".*",)})
    with pytest.raises(ValueError, match="tunes plain prompts.*deep"):
        Member.of("a", {"prompt": np.ones((2, 3)), "deep": np.ones((1, 2, 3))})


def test_the_gradient_of_a_member_does_not_depend_on_the_others(tiny, pairs):
    members = [member(tiny, pairs, None, str(s), seed=s, train_steps=1) for s in (0, 1)]
    other = dataclasses.replace(members[1], prompt=members[1].prompt * 40)
    first = population.fit(tiny, members)[0].result.trained
    second = population.fit(tiny, [members[0], other])[0].result.trained
    assert jax.tree.map(np.ndarray.tobytes, first) == jax.tree.map(np.ndarray.tobytes, second)
