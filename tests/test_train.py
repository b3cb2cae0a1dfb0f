"""The thesis first: a step moves the prompt, and every backbone leaf stays bit-identical."""

import dataclasses
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY

from softprompt import backbone as backbones
from softprompt import (
    checkpoint,
    data,
    eval_task,
    evaluation,
    logbook,
    losses,
    optim,
    packing,
    partition,
    prompt,
    prompted,
    segments,
    selection,
    signals,
    train,
    train_step,
    tree,
)
from softprompt.prompted import PromptedT5, slots

LENGTHS = {"inputs": 16, "targets": 8}


def batches_of(backbone, pairs, rows, batch_size=4, seed=0):
    examples = data.from_pairs(pairs, backbone.vocabulary, LENGTHS)
    slots = prompted.slots(backbone.cfg.vocab_size, rows)
    return data.train_batches([examples], [1.0], batch_size, seed, slots)


def prompt_of(backbone, rows=5):
    return np.random.default_rng(1).uniform(-0.5, 0.5, (rows, backbone.cfg.emb_dim)).astype("f4")


def fit(backbone, pairs, steps=4, rows=5, **settings):
    settings.setdefault("log_period", 100)
    return train.fit(
        backbone,
        settings.pop("batches", None) or batches_of(backbone, pairs, rows),
        settings.pop("optimizer", None) or optim.adafactor(0.3),
        steps,
        prompt=prompt_of(backbone, rows) if rows else None,
        **settings,
    )


def bits(flat):
    return {path: np.asarray(jax.device_get(x)).tobytes() for path, x in flat.items()}


# --- the thesis ---------------------------------------------------------------------------------


def test_a_step_moves_the_prompt_and_no_bit_of_the_backbone(embedded, pairs):
    before, before_print = bits(embedded.params), tree.fingerprint(embedded.params)
    start = prompt_of(embedded)
    result = fit(embedded, pairs, steps=1)
    assert set(result.trained) == {train.PROMPT}
    moved = np.abs(result.trained[train.PROMPT] - start)
    assert (moved > 0).all(), "every number of the prompt takes part"
    after = bits(embedded.params)
    assert after.keys() == before.keys()
    assert [path for path in before if after[path] != before[path]] == []
    assert tree.fingerprint(embedded.params) == before_print


def test_model_tuning_moves_every_leaf(tiny, pairs):
    result = fit(tiny, pairs, trainable=(".*",), optimizer=optim.adafactor(1e-2))
    assert set(result.trained) == {*tiny.params, train.PROMPT}
    still = [p for p, x in tiny.params.items() if np.array_equal(x, result.trained[p])]
    assert still == []


def test_a_named_partition_trains_alone(tiny, pairs):
    pattern = "decoder/logits_dense/.*"
    result = fit(tiny, pairs, trainable=(pattern,))
    assert set(result.trained) == {"decoder/logits_dense/kernel"}


def compiled(backbone, trainable, rows=5):
    optimizer = optim.adafactor(0.3)
    params = dict(backbone.params, **{train.PROMPT: jnp.asarray(prompt_of(backbone, rows))})
    trained, fixed = tree.split(params, trainable)
    state = train_step.init_state(trained, optimizer, backbone.mesh)
    step = jax.jit(train_step.make_step(PromptedT5(backbone.cfg, rows), optimizer))
    batch = {"encoder_ids": np.ones((4, 21), np.int32), "targets": np.ones((4, 8), np.int32)}
    return state, step.lower(state, fixed, batch).compile()


def test_frozen_weights_have_neither_gradients_nor_optimizer_state(embedded):
    prompt_state, prompt_step = compiled(embedded, ("prompt/.*",))
    full_state, full_step = compiled(embedded, (".*",))
    floats = {
        name: sum(x.size for x in jax.tree.leaves(state["opt"]))
        for name, state in (("prompt", prompt_state), ("full", full_state))
    }
    # Adafactor keeps at most one number per parameter, and a few counters.
    assert floats["prompt"] < 2 * 5 * embedded.cfg.emb_dim
    assert floats["full"] > 40 * floats["prompt"]
    # A frozen kernel costs two products (forward, gradient of its input), a trained one three.
    ratio = prompt_step.cost_analysis()["flops"] / full_step.cost_analysis()["flops"]
    assert ratio < 0.75


# --- the loss among the labels ------------------------------------------------------------------


def test_the_loss_among_labels_is_that_of_their_softmax(rng):
    scores = jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)
    label_ids = jnp.array([[5, 6, 1, 0], [5, 1, 0, 0]])
    targets = jnp.array([[5, 1, 0], [5, 6, 1], [0, 0, 0]])
    loss, rows = losses.label_cross_entropy(scores, targets, label_ids)
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    assert rows == 2
    np.testing.assert_allclose(loss, -np.log(p[0, 1]) - np.log(p[1, 0]), rtol=1e-6)


def test_the_loss_among_labels_teaches_the_ranking(embedded, pairs):
    ids = eval_task.encode_labels(["positive", "negative"], embedded.vocabulary)
    examples = data.from_pairs(pairs, embedded.vocabulary, LENGTHS)
    task = eval_task.from_pairs(examples, ["positive", "negative"])
    predictor = evaluation.Predictor(embedded, 5, evaluation.RANK, 4, 8)
    result = fit(embedded, pairs, 150, label_ids=ids)
    flat = {**embedded.params, train.PROMPT: jnp.asarray(result.trained[train.PROMPT])}
    assert evaluation.evaluate(predictor, flat, [task])["accuracy"] >= 90


def test_the_loss_among_labels_needs_labels_that_hold_every_target(embedded, pairs):
    part = data.from_pairs(pairs, embedded.vocabulary, LENGTHS, "reviews")
    check = lambda loss, *labels: eval_task.training_labels(  # noqa: E731
        loss, [part] * len(labels), labels, embedded.vocabulary
    )
    assert check("tokens", None) is None
    assert check("labels", ["positive", "negative"]).shape[0] == 2
    with pytest.raises(ValueError, match="LOSS is 'label', expected 'tokens' or 'labels'"):
        check("label", None)
    with pytest.raises(ValueError, match="reviews has no labels"):
        check("labels", None)
    with pytest.raises(ValueError, match="reviews: target 6 is 'negative', expected one of"):
        check("labels", ["positive", "neutral"])
    with pytest.raises(ValueError, match=r"has the labels \['a'\] and reviews \['b'\]"):
        check("labels", ["a"], ["b"])


# --- freezing rules -----------------------------------------------------------------------------


def test_a_pattern_that_matches_nothing_is_an_error(tiny, pairs):
    with pytest.raises(ValueError, match="'promt/.\\*' matches no parameter"):
        fit(tiny, pairs, trainable=("promt/.*",))


def test_a_parameter_without_a_rule_is_an_error(tiny, pairs):
    with pytest.raises(ValueError, match="train or stay frozen: decoder/"):
        fit(tiny, pairs, frozen=("encoder/.*",))


# --- divergence ---------------------------------------------------------------------------------


def keep(saved):
    def save(path, trained, note):
        saved[path.name] = trained[train.PROMPT]
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".safetensors").touch()

    return save


def test_an_update_that_is_not_finite_stops_and_keeps_the_last_good_prompt(tiny, pairs, tmp_path):
    saved = {}
    optimizer = optim.adafactor(lambda step: jnp.where(step >= 2, jnp.nan, 0.3))
    with pytest.raises(train.Diverged, match="not finite at step 3.*prompts/2.safetensors"):
        fit(tiny, pairs, 20, optimizer=optimizer, model_dir=tmp_path, save=keep(saved))
    np.testing.assert_array_equal(saved["2"], fit(tiny, pairs, 2).trained[train.PROMPT])


def test_a_loss_that_is_not_finite_names_its_step(tiny, pairs, tmp_path):
    saved = {}
    sick = {**tiny.params, "decoder/decoder_norm/scale": jnp.full(24, jnp.nan)}
    backbone = dataclasses.replace(tiny, params=sick)
    with pytest.raises(train.Diverged, match="not finite at step 1"):
        fit(backbone, pairs, 20, model_dir=tmp_path, save=keep(saved))
    np.testing.assert_array_equal(saved["0"], prompt_of(tiny))


def test_what_was_not_saved_is_not_told_of(tiny, pairs, tmp_path):
    optimizer = optim.adafactor(lambda step: jnp.nan)
    settings = dict(trainable=("decoder/logits_dense/.*",), rows=0, optimizer=optimizer)
    with pytest.raises(train.Diverged, match="not finite at step 1$"):
        fit(tiny, pairs, 2, model_dir=tmp_path, save=prompt.saver({}, None), **settings)


# --- resuming -----------------------------------------------------------------------------------


class Killed(Exception):
    pass


def test_two_runs_do_not_share_a_folder(tiny, pairs, tmp_path):
    with checkpoint.locked(tmp_path):
        with pytest.raises(ValueError, match="another run is writing to MODEL_DIR '"):
            fit(tiny, pairs, 1, model_dir=tmp_path)
        with pytest.raises(ValueError, match="another run is writing"):
            train.check_resumable(tmp_path, {}, 1)
    with train.own_folder(tmp_path), pytest.raises(ValueError, match="another run"):
        fit(tiny, pairs, 1, model_dir=tmp_path)
    with checkpoint.locked(tmp_path), checkpoint.locked(tmp_path / "other"), train.own_folder(None):
        pass


def test_the_lock_of_a_killed_run_is_free(tmp_path):
    code = "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.flock(f, 2); print(1, flush=True)"
    command = [sys.executable, "-c", f"{code}; sys.stdin.read()", str(tmp_path / ".lock")]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.readline()
        with pytest.raises(ValueError, match="another run is writing"), checkpoint.locked(tmp_path):
            pass
        process.kill()
    with checkpoint.locked(tmp_path):
        pass


def killed_before_its_prompts(monkeypatch):
    """A `save` that writes, one of a run that is killed there, and the steps of its checkpoints."""
    write, steps = prompt.saver({}, None), []

    def killed(path, trained, note):
        if path.name != "initial":
            raise Killed
        write(path, trained, note)

    save_state = checkpoint.save_state
    monkeypatch.setattr(
        checkpoint, "save_state",
        lambda folder, state, *rest: [steps.append(int(state["step"])),
                                      save_state(folder, state, *rest)],
    )  # fmt: skip
    return write, killed, steps


def test_killed_before_its_prompts_a_run_without_evaluation_can_be_finished(
    tiny, pairs, tmp_path, monkeypatch
):
    write, killed, steps = killed_before_its_prompts(monkeypatch)
    with pytest.raises(Killed):
        fit(tiny, pairs, 2, model_dir=tmp_path, save=killed)
    assert steps == [2], "written once"
    result = fit(tiny, pairs, 2, model_dir=tmp_path, save=write)
    for name in ("2", "best"):
        saved, note = prompt.load(tmp_path / "prompts" / f"{name}.safetensors")
        np.testing.assert_array_equal(saved, result.trained[train.PROMPT])
        assert note["step"] == 2
    assert steps == [2]


def test_what_a_run_came_back_from_does_not_take_the_place_of_new_checkpoints(tmp_path):
    for step in (3, 6, 4):
        state = {"step": np.int32(step), "x": np.ones(2, np.float32)}
        checkpoint.save_state(tmp_path, state, {}, 1 if step == 4 else 2)
    assert checkpoint.steps(tmp_path) == [4]


def test_a_resumed_run_ends_bit_identical(tiny, pairs, tmp_path):
    whole = fit(tiny, pairs, 9)
    fit(tiny, pairs, 4, model_dir=tmp_path)
    resumed = fit(tiny, pairs, 9, model_dir=tmp_path)
    assert resumed.step == whole.step == 9
    assert bits(resumed.trained) == bits(whole.trained)


def test_a_corrupt_checkpoint_is_named_and_the_one_before_it_taken(tiny, pairs, tmp_path, capsys):
    whole = fit(tiny, pairs, 9)
    fit(tiny, pairs, 6, model_dir=tmp_path, checkpoint_period=3)
    newest = tmp_path / "checkpoints" / "6.safetensors"
    content = bytearray(newest.read_bytes())
    content[-9] ^= 1
    newest.write_bytes(content)
    resumed = fit(tiny, pairs, 9, model_dir=tmp_path)
    said = capsys.readouterr().out
    assert "6.safetensors' is corrupt" in said and "resuming from step 3" in said
    assert bits(resumed.trained) == bits(whole.trained)


def test_when_every_checkpoint_is_torn_nothing_is_started_over(tiny, pairs, tmp_path):
    fit(tiny, pairs, 2, model_dir=tmp_path)
    path = tmp_path / "checkpoints" / "2.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="every checkpoint .* is corrupt"):
        fit(tiny, pairs, 4, model_dir=tmp_path)


def test_the_checkpoint_of_another_run_is_refused(tiny, pairs, tmp_path):
    fit(tiny, pairs, 2, model_dir=tmp_path, identity={"task": "a", "seed": 0})
    with pytest.raises(ValueError, match="task was 'a', is now 'b'"):
        fit(tiny, pairs, 4, model_dir=tmp_path, identity={"task": "b", "seed": 0})
    with pytest.raises(ValueError, match="another run"):
        fit(tiny, pairs, 4, rows=7, model_dir=tmp_path, identity={"task": "a", "seed": 0})


def test_a_checkpoint_holds_no_frozen_weights(tiny, pairs, tmp_path):
    fit(tiny, pairs, 2, model_dir=tmp_path)
    size = (tmp_path / "checkpoints" / "2.safetensors").stat().st_size
    assert size < 10 * 5 * tiny.cfg.emb_dim * 4 + 4096


# A run of its own process, slow enough to be stopped in its middle, that logs every step.
RUN = """
import signal, sys, time, numpy as np, softprompt
signal.signal(signal.SIGINT, signal.default_int_handler)
from softprompt import partition, backbone as backbones, prompt, data
sys.path.insert(0, {tests!r})
from conftest import TINY
from softprompt.formats import native
from softprompt.vocabulary import Vocabulary
words = Vocabulary(native.EMBEDDED / native.VOCABULARY_FILE)
tiny = backbones.random(TINY, 0, words, partition.make_mesh(devices=1), "tiny")
pairs = [("a fine film", "positive"), ("a dull film", "negative"), ("I like it", "positive"),
         ("I hate it", "negative"), ("very good", "positive"), ("very bad", "negative")]
pad = data.pad
def slow_pad(*arguments):
    time.sleep({pause})
    return pad(*arguments)
data.pad = slow_pad
softprompt.tune(tiny, pairs, pairs, labels=["positive", "negative"], prompt_length=5,
    train_steps=60, batch_size=4, eval_period=20, log_period=1, checkpoint_period=7,
    model_dir=sys.argv[1], lengths={{"inputs": 16, "targets": 8}})
"""


def start(folder: pathlib.Path, pause: float = 0.0) -> subprocess.Popen:
    code = textwrap.dedent(RUN.format(tests=str(pathlib.Path(__file__).parent), pause=pause))
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)


def stop_after(process: subprocess.Popen, step: int, how: signal.Signals) -> str:
    """Sends a signal once the run has logged `step`; returns all that it said."""
    said = ""
    for line in process.stdout:
        said += line.decode()
        if line.startswith(f"step {step}/".encode()):
            process.send_signal(how)
            break
    rest, _ = process.communicate(timeout=120)
    return said + rest.decode()


def outcome(folder: pathlib.Path):
    figures = (folder / "eval" / "metrics.jsonl").read_text()
    lines = map(json.loads, (folder / "train.jsonl").read_text().splitlines())
    losses = [(line["step"], line["loss"]) for line in lines]  # The rest are rates.
    prompts = {p.name: p.read_bytes() for p in (folder / "prompts").iterdir()}
    return figures, losses, prompts


@pytest.mark.slow
def test_killed_at_any_moment_a_run_ends_as_if_it_had_not_been(tmp_path):
    whole = tmp_path / "whole"
    assert start(whole).wait(timeout=120) == 0
    killed = tmp_path / "killed"
    for step in (3, 12, 41):
        process = start(killed, pause=0.01)
        stop_after(process, step, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    assert start(killed).wait(timeout=120) == 0
    assert outcome(killed) == outcome(whole)


@pytest.mark.slow
def test_sigterm_saves_and_the_run_goes_on_from_that_step(tmp_path):
    process = start(tmp_path, pause=0.01)
    said = stop_after(process, 10, signal.SIGTERM)
    assert process.returncode == 0
    assert "stopped by a signal after step" in said
    stopped_at = int(said.split("stopped by a signal after step ")[1].split(";")[0])
    assert 10 <= stopped_at < 60
    again = start(tmp_path)
    said = again.communicate(timeout=120)[0].decode()
    assert again.returncode == 0
    assert f"resuming from step {stopped_at}" in said


@pytest.mark.slow
def test_ctrl_c_saves_the_step_and_ends_the_process(tmp_path):
    process = start(tmp_path, pause=0.05)
    said = stop_after(process, 10, signal.SIGINT)
    assert process.returncode != 0, "what comes after the run is not begun"
    assert "stopping after this step, which is saved; Ctrl-C again stops at once" in said
    stopped_at = int(said.split("stopped by a signal after step ")[1].split(";")[0])
    assert 10 <= stopped_at < 60
    said = start(tmp_path).communicate(timeout=120)[0].decode()
    assert f"resuming from step {stopped_at}" in said and "step 60/60" in said


def test_ctrl_c_waits_until_the_caches_are_cleared(own_signals, monkeypatch):
    own_signals(signal.default_int_handler)
    done = []

    def clear():
        signal.raise_signal(signal.SIGINT)
        done.append(True)

    monkeypatch.setattr(jax, "clear_caches", clear)
    with pytest.raises(KeyboardInterrupt):
        signals.clear_caches()
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    own_signals(signal.SIG_IGN)
    signals.clear_caches()
    assert len(done) == 2, "of a run in the background nothing is asked"


@pytest.fixture
def own_signals():
    """A handler of Ctrl-C whose change a test may see, put back after it."""
    before = signal.getsignal(signal.SIGINT)
    yield lambda handler: signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "at, number", [(4, signal.SIGTERM), (4, signal.SIGINT), (6, signal.SIGTERM)]
)
def test_a_signal_stops_an_evaluation_which_is_done_when_the_run_goes_on(
    tiny, pairs, tmp_path, own_signals, at, number
):
    own_signals(signal.default_int_handler)
    calls, ended = [], []

    def evaluate(flat, step):
        calls.append(step)
        if calls.count(at) == 1 and step == at:
            signal.raise_signal(number)
        ended.append(step)
        return {"accuracy": float(np.asarray(flat[train.PROMPT]).sum())}

    def run(folder):
        settings = dict(evaluate=evaluate, eval_period=2, model_dir=folder, keep=9, log_period=1)
        return fit(tiny, pairs, 6, **settings)

    if number == signal.SIGINT:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run")
    else:
        result = run(tmp_path / "run")
        assert result.interrupted and result.step == at
    assert calls == list(range(2, at + 1, 2)) and ended == calls[:-1]
    assert checkpoint.steps(tmp_path / "run") == [at]
    result = run(tmp_path / "run")
    assert not result.interrupted and ended == [2, 4, 6]
    whole = run(tmp_path / "whole")
    for which in ("trained", "best"):
        one, two = (getattr(x, which)[train.PROMPT].tobytes() for x in (result, whole))
        assert one == two
    for name, keys in (("eval/metrics.jsonl", ("accuracy",)), ("train.jsonl", ("loss",))):
        one, two = (
            [[row[k] for k in ("step", *keys)] for row in map(json.loads, path.open())]
            for path in (tmp_path / folder / name for folder in ("run", "whole"))
        )
        assert one == two and len(one) == (3 if "eval" in name else 6)
    one, two = (
        checkpoint.read(checkpoint.step_path(tmp_path / folder, 6))[1]["best"]
        for folder in ("run", "whole")
    )
    assert one == two


def test_a_signal_just_before_an_evaluation_stops_it_too(own_signals):
    own_signals(signal.default_int_handler)
    with signals.termination(True) as asked:
        assert not asked(2)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(signals.Stopped), asked.at_once():
            pytest.fail("it was evaluated")
        assert asked(3)


def test_an_evaluation_that_ends_patience_is_done_again_once(tiny, pairs, tmp_path, own_signals):
    own_signals(signal.default_int_handler)
    calls = []

    def evaluate(flat, step):
        calls.append(step)
        if calls == [2, 4]:
            signal.raise_signal(signal.SIGTERM)
        return {"accuracy": -float(step)}

    for _ in range(3):
        result = fit(
            tiny, pairs, 8, evaluate=evaluate, eval_period=2, patience=1, model_dir=tmp_path
        )
    assert calls == [2, 4, 4] and result.step == 4 and result.best_step == 2


def test_figures_to_choose_by_may_be_gone_at_a_later_step(tiny, pairs):
    judge = lambda flat, step: {"accuracy": 1.0} if step == 2 else {}  # noqa: E731
    assert fit(tiny, pairs, 6, evaluate=judge, eval_period=2).best_step == 2


def test_steps_that_compile_are_no_part_of_the_rates(tiny, pairs, monkeypatch):
    from softprompt import logbook, throughput

    left_out, added, told = [], [], []
    for kind in (throughput.Meter, logbook.Logbook):
        monkeypatch.setattr(kind, "leave_out", lambda self, seconds: left_out.append(type(self)))
    add = throughput.Meter.add
    monkeypatch.setattr(
        throughput.Meter, "add", lambda self, *batch: added.append(1) or add(self, *batch)
    )
    monkeypatch.setattr(logbook.Logbook, "progress", lambda self, *given: told.append(given[-1]))
    plain = batches_of(tiny, pairs, 5)

    def widths(step):
        for number, batch in enumerate(plain(step), step + 1):
            ids = batch["encoder_ids"]
            wide = np.pad(ids, [(0, 0), (0, 4 * (number in (3, 5)))])
            yield {**batch, "encoder_ids": wide}

    fit(tiny, pairs, 6, batches=widths, log_period=1)
    # Steps 1 and 3 compile, one of each width.
    assert left_out == [logbook.Logbook, throughput.Meter] and len(added) == 4
    assert [bool(rates) for rates in told] == [False, True, False, True, True, True]


def test_ctrl_c_that_is_ignored_stays_so(own_signals):
    own_signals(signal.SIG_IGN)
    with signals.termination(True) as asked:
        signal.raise_signal(signal.SIGINT)
        assert not asked(1)


def test_ctrl_c_waits_for_nothing_where_nothing_is_saved_or_it_comes_twice(own_signals):
    own_signals(signal.default_int_handler)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), signals.termination(False):
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")
    with pytest.raises(KeyboardInterrupt), signals.termination(True) as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked(1)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")
    with pytest.raises(KeyboardInterrupt), signals.termination(True) as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked(1)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_evaluation_that_fails_at_the_end_loses_no_step(tiny, pairs, tmp_path, capsys):
    def broken(flat, step):
        if step == 4:
            raise ZeroDivisionError
        return {"accuracy": 1.0}

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            fit(tiny, pairs, 4, evaluate=broken, eval_period=2, model_dir=tmp_path)
    assert "resuming from step 4" in capsys.readouterr().out
    mended = fit(
        tiny, pairs, 4, evaluate=lambda *_: {"accuracy": 2.0}, eval_period=2, model_dir=tmp_path
    )
    whole = fit(tiny, pairs, 4, evaluate=lambda *_: {"accuracy": 2.0})
    assert (mended.step, mended.best_step, mended.best_metric) == (4, 4, 2.0)
    np.testing.assert_array_equal(mended.trained[train.PROMPT], whole.trained[train.PROMPT])


# --- the best prompt ----------------------------------------------------------------------------


def test_the_best_step_is_kept_and_patience_stops(tiny, pairs):
    figures = iter([1.0, 3.0, 2.0, 2.5, 9.0])
    seen = {}

    def evaluate(flat, step):
        seen[step] = np.asarray(flat[train.PROMPT]).copy()
        return {"accuracy": next(figures), "illegal": 100.0}

    result = fit(tiny, pairs, 20, evaluate=evaluate, eval_period=2, patience=2)
    assert (result.step, result.best_step, result.best_metric) == (8, 4, 3.0)
    np.testing.assert_array_equal(result.best[train.PROMPT], seen[4])


def test_any_number_is_better_than_nan():
    best, log = selection.Best(None, None, None), logbook.Logbook(None, 0)
    for step, metric in enumerate((float("nan"), float("nan"), -5.0, float("nan"), 1.0), 1):
        best.judge(step, {"accuracy": metric}, log, dict)
        found = best.step, best.facts["waited"]
        assert found == ((1, 0), (1, 1), (3, 0), (3, 1), (5, 0))[step - 1]


def judged(tiny, pairs, folder, steps, kill=None, seen=None, **settings):
    """A run that gets better at every second step, and whose checkpoints are every third."""

    def evaluate(flat, step):
        if step == kill:
            raise Killed
        if seen is not None:
            seen[step] = np.asarray(flat[train.PROMPT]).copy()
        return {"accuracy": float(step)}

    settings = {"evaluate": evaluate, "eval_period": 2, "checkpoint_period": 3, **settings}
    return fit(tiny, pairs, steps, model_dir=folder, **settings)


def test_the_saved_prompt_takes_the_place_of_a_torn_best_file(tiny, pairs, tmp_path, capsys):
    save, best = prompt.saver({}, None), tmp_path / "checkpoints" / "best.safetensors"
    first = judged(tiny, pairs, tmp_path, 2, save=save)
    whole = best.read_bytes()
    for content in (whole[:-5], None):
        best.unlink()
        if content is not None:
            best.write_bytes(content)
        again = judged(tiny, pairs, tmp_path, 2, save=save)
        assert "going on with the prompt that was saved at step 2" in capsys.readouterr().out
        assert bits(again.best) == bits(first.best) and best.read_bytes() == whole
    best.unlink()
    shutil.rmtree(tmp_path / "prompts")
    with pytest.raises(checkpoint.CorruptFile, match="no such file: .*best.* remove the folder '"):
        judged(tiny, pairs, tmp_path, 2, save=save)


def test_a_best_file_newer_than_its_checkpoint_is_not_taken_for_the_older_step(
    tiny, pairs, tmp_path
):
    save, seen = prompt.saver({}, None), {}
    with pytest.raises(Killed):
        judged(tiny, pairs, tmp_path, 8, kill=6, save=save, seen=seen)
    worse = {"evaluate": lambda flat, step: {"accuracy": -1.0}}
    result = judged(tiny, pairs, tmp_path, 3, save=save, **worse)
    assert (result.step, result.best_step, result.best_metric) == (3, 2, 2.0)
    np.testing.assert_array_equal(result.best[train.PROMPT], seen[2])
    # The files are that step's again.
    for folder in ("checkpoints", "prompts"):
        [saved] = checkpoint.read(tmp_path / folder / "best.safetensors")[0].values()
        np.testing.assert_array_equal(saved, seen[2])


def test_without_a_prompt_of_the_older_step_the_best_is_chosen_anew(tiny, pairs, tmp_path, capsys):
    settings = dict(rows=0, trainable=("decoder/logits_dense/.*",))
    with pytest.raises(Killed):
        judged(tiny, pairs, tmp_path, 8, kill=6, **settings)
    result = judged(tiny, pairs, tmp_path, 6, **settings)
    assert "the best step is chosen anew from here" in capsys.readouterr().out
    assert (result.best_step, result.best_metric) == (6, 6.0)


def test_best_metric_may_be_named_and_minimised():
    figures = {"loss": 2.0, "accuracy": 50.0, "illegal": 7.0}
    assert selection.choose_metric(figures, "-loss") == -2.0
    assert selection.choose_metric(figures, "accuracy") == 50.0
    with pytest.raises(ValueError, match="'f1' is not among the figures loss, accuracy"):
        selection.choose_metric(figures, "f1")


def test_without_a_figure_to_choose_by_the_last_step_is_the_best(tiny, pairs, tmp_path):
    for figures in ({}, {"illegal": 2.0}):
        settings = dict(evaluate=lambda flat, step: dict(figures), eval_period=2)  # noqa: B023
        result = fit(tiny, pairs, 6, model_dir=tmp_path / str(len(figures)), **settings)
        assert (result.best_step, result.best_metric, result.metrics) == (6, None, figures)
        np.testing.assert_array_equal(result.best[train.PROMPT], result.trained[train.PROMPT])


def test_settings_within_settings_are_told_apart_by_both_names():
    was = {"rates": {"a": 1, "b": {"c": 2}}, "same": [1], "kind": {"d": 1}}
    now = {"rates": {"a": 1, "b": {"c": 3}, "e": 4}, "same": (1,), "kind": None}
    assert checkpoint.differences(was, now) == [
        "kind was {'d': 1}, is now None",
        "rates: b: c was 2, is now 3",
        "rates: e was None, is now 4",
    ]


def test_without_an_evaluation_nothing_is_evaluated(tiny, pairs):
    calls = []
    fit(tiny, pairs, 4, evaluate=lambda flat, step: calls.append(step) or {"a": 0.0})
    assert calls == [4], "only at the end, unless an eval period is given"


def test_a_run_that_is_at_its_end_already_is_evaluated_if_it_never_was(tiny, pairs, tmp_path):
    calls, save = [], prompt.saver({}, None)
    settings = dict(
        model_dir=tmp_path, save=save,
        evaluate=lambda flat, step: calls.append(step) or {"accuracy": 5.0},
    )  # fmt: skip
    with pytest.raises(Killed):
        fit(tiny, pairs, 4, checkpoint_period=2, **{**settings, "evaluate": killing})
    for _ in range(2):
        result = fit(tiny, pairs, 4, **settings)
        assert (result.step, result.best_step, result.metrics) == (4, 4, {"accuracy": 5.0})
    assert calls == [4], "once"
    saved, _ = prompt.load(tmp_path / "prompts" / "best.safetensors")
    np.testing.assert_array_equal(saved, result.trained[train.PROMPT])


def killing(flat, step):
    raise Killed


def test_dropout_and_half_precision_train_the_prompt_in_float32(vocabulary, pairs):
    cfg = dataclasses.replace(
        TINY, num_encoder_layers=1, num_decoder_layers=1, dropout_rate=0.1, dtype=jnp.bfloat16
    )
    backbone = backbones.random(cfg, 0, vocabulary, partition.make_mesh(devices=1))
    one, other = fit(backbone, pairs, seed=0), fit(backbone, pairs, seed=1)
    assert one.trained[train.PROMPT].dtype == np.float32
    assert not np.array_equal(one.trained[train.PROMPT], other.trained[train.PROMPT])
    again = fit(backbone, pairs, seed=0)
    assert bits(one.trained) == bits(again.trained)


# --- packing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("long", [1, 256], ids=["by segment", "whole"])
def test_packed_examples_have_the_loss_and_gradient_of_unpacked_ones(
    tiny, pairs, monkeypatch, long
):
    """Also with two different prompts in one row, an example of each."""
    monkeypatch.setattr(segments, "LONG", long)
    monkeypatch.setattr(segments, "_cores", lambda: 1)
    took = []
    monkeypatch.setattr(segments, "attend", lambda *x, of=segments.attend: took.append(x) or of(*x))
    examples = data.from_pairs(pairs, tiny.vocabulary, {"inputs": 16, "targets": 8})
    bank = np.random.default_rng(5).normal(size=(10, tiny.cfg.emb_dim)).astype(np.float32)
    module = PromptedT5(tiny.cfg, 10)
    first, second = slots(tiny.cfg.vocab_size, 4), slots(tiny.cfg.vocab_size, 6, 4)
    chosen = [(0, first), (7, second), (3, second)]

    def loss(bank, batch):
        params = tree.unflatten({**tiny.params, train.PROMPT: bank})
        segments = batch.get("encoder_segments"), batch.get("decoder_segments")
        inputs = losses.shift_right(batch["targets"], segments[1])
        logits = module.apply({"params": params}, batch["encoder_ids"], inputs, *segments)
        return losses.cross_entropy(logits, batch["targets"])[0]

    alone = [
        {
            "encoder_ids": np.concatenate([own, examples.inputs[i]])[None],
            "targets": examples.targets[i][None],
        }
        for i, own in chosen
    ]
    row = {
        "encoder_ids": np.concatenate([x["encoder_ids"] for x in alone], 1),
        "targets": np.concatenate([x["targets"] for x in alone], 1),
    }
    for side, name in (("encoder", "encoder_ids"), ("decoder", "targets")):
        numbers = [np.full_like(x[name], k) for k, x in enumerate(alone, 1)]
        row[f"{side}_segments"] = np.concatenate(numbers, 1)
    row = {name: np.pad(x, ((0, 0), (0, 5))) for name, x in row.items()}
    with jax.default_matmul_precision("highest"):
        separate = [jax.value_and_grad(loss)(bank, x) for x in alone]
        total, gradient = jax.value_and_grad(loss)(bank, row)
    assert bool(took) == (long == 1)
    np.testing.assert_allclose(total, sum(x for x, _ in separate), rtol=1e-5)
    np.testing.assert_allclose(gradient, sum(g for _, g in separate), atol=1e-5)
    assert np.abs(gradient).max() > 1e-2


def step_gradient(tiny, rows, batch, label_ids):
    """Gradient of the mean loss in the bank and the loss's sum and count, by one step of SGD."""
    module = PromptedT5(tiny.cfg, rows)
    bank = np.random.default_rng(5).normal(size=(rows, tiny.cfg.emb_dim)).astype(np.float32)
    start = {train.PROMPT: jnp.asarray(bank)}
    state = train_step.init_state(start, optax.sgd(1.0), tiny.mesh)
    with jax.default_matmul_precision("highest"):
        step = train_step.make_step(module, optax.sgd(1.0), label_ids=label_ids)
        after = jax.jit(step)(state, tiny.params, batch)
    return bank - after["trainable"][train.PROMPT], after["loss_sum"], after["count_sum"]


def test_the_loss_among_labels_is_the_same_for_packed_examples(tiny, pairs):
    """Two tasks in a row, of labels with different numbers of tokens; also for target tokens."""
    named = [
        (text, "positive" if target == "positive" else "very negative") for text, target in pairs
    ]
    examples = data.from_pairs(named, tiny.vocabulary, {"inputs": 16, "targets": 8})
    other = data.from_pairs(
        [("question: " + text, target) for text, target in named],
        tiny.vocabulary, {"inputs": 16, "targets": 8}, "other",
    )  # fmt: skip
    label_ids = eval_task.encode_labels(["positive", "very negative"], tiny.vocabulary)
    own = slots(tiny.cfg.vocab_size, 5)
    for labels in (label_ids, None):
        width = 0 if labels is None else labels.shape[1]
        packed = packing.Packing([examples, other], [1, 1], 12, 0, own, 48, label_length=width)
        rows = [[(examples, 0), (other, 7)], [(other, 3)]]
        members = [member for row in rows for member in row]
        inputs = [part.inputs[i] for part, i in members]
        targets = [part.targets[i] for part, i in members]
        separate = {
            "encoder_ids": data.pad(inputs, len(members), 16, own),
            "targets": data.pad(targets, len(members), 8),
        }
        one = step_gradient(tiny, 5, packed.pack(rows), labels)
        two = step_gradient(tiny, 5, separate, labels)
        for a, b in zip(one, two, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        assert two[2] == (len(members) if width else sum(map(len, targets)))
        assert np.abs(two[0]).max() > 1e-3


def test_training_on_packed_rows_moves_the_prompt_alone(tiny, pairs):
    examples = data.from_pairs(pairs, tiny.vocabulary, {"inputs": 16, "targets": 8})
    own = slots(tiny.cfg.vocab_size, 5)
    packed = packing.Packing([examples], [1.0], 6, 0, own, 48)
    before = bits(tiny.params)
    result = fit(tiny, pairs, steps=3, batches=packed)
    assert np.abs(result.trained[train.PROMPT] - prompt_of(tiny)).max() > 0
    assert bits(tiny.params) == before


def test_a_rate_without_warm_up_is_a_number_from_the_first_step_on():
    rate = optim.rsqrt(0.5, warmup_steps=0)
    np.testing.assert_allclose([rate(step) for step in (0, 1, 4)], [0.5, 0.5, 0.25])
