"""Two processes of four devices train what one device does; a lost one stops the others."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from softprompt import __main__ as command
from softprompt import checkpoint, hosts, mistakes, partition

# A run of one process or of a job's process NUMBER, slow enough to be stopped in its middle.
RUN = """
import sys, time
tests, folder, count, number, address, model, pause, steps = sys.argv[1:]
sys.path.insert(0, tests)
from softprompt import hosts
flags = dict(coordinator_address=address, num_processes=int(count), process_id=int(number))
with hosts.job(**flags if int(count) > 1 else {}):
    import dataclasses, jax, softprompt
    from conftest import TINY
    from softprompt import backbone as backbones, data, partition, tree
    from jax.experimental import multihost_utils
    from softprompt.formats import Stored, native
    from softprompt.vocabulary import Vocabulary
    words = Vocabulary(native.EMBEDDED / native.VOCABULARY_FILE)
    mesh = partition.make_mesh(model=int(model), devices=None if int(count) > 1 else 1)
    sizes = dict(num_encoder_layers=1, num_decoder_layers=1, dropout_rate=0.1)
    cfg = dataclasses.replace(TINY, **sizes)
    tiny = backbones.random(cfg, 0, words, mesh, "tiny")
    if int(model) > 1:
        # Through a file: the first process writes what all hold, and each keeps its own shards.
        native.save(folder + "-backbone", Stored.of("tiny", cfg, tiny.params, words))
        multihost_utils.sync_global_devices("saved")
        tiny = backbones.load(folder + "-backbone", dropout_rate=0.1, mesh=mesh)
        kernel = tiny.params["encoder/layers_0/mlp/wi_0/kernel"]
        assert {x.data.shape for x in kernel.addressable_shards} == {(24, 40 // int(model))}
    pairs = [(f"number {i} of the lot", "odd" if i % 2 else "even") for i in range(16)]
    pad = data.pad
    def slow_pad(*arguments):
        time.sleep(float(pause))
        return pad(*arguments)
    data.pad = slow_pad
    softprompt.tune(tiny, pairs, pairs, labels=["odd", "even"], prompt_length=5,
        train_steps=int(steps), batch_size=8, eval_period=int(steps) // 2, log_period=1,
        checkpoint_period=4, model_dir=folder, lengths={"inputs": 16, "targets": 8})
    print("devices", len(jax.devices()), "rows", partition.local_rows(mesh, 8))
    print("fingerprint", tree.fingerprint(tiny.params))
"""


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def start(folder, count=1, model=1, pause=0.0, steps=8) -> list[subprocess.Popen]:
    """The processes of a run; what each says lies in `<folder>-<number>.txt`."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    if count > 1:
        env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    address, tests = free_address(), str(pathlib.Path(__file__).parent)
    started = []
    for number in range(count):
        with open(f"{folder}-{number}.txt", "a") as log:
            arguments = (tests, folder, count, number, address, model, pause, steps)
            started.append(
                subprocess.Popen(
                    [sys.executable, "-c", RUN, *map(str, arguments)],
                    env=env,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    preexec_fn=hear_ctrl_c,
                )  # fmt: skip
            )
    return started


def hear_ctrl_c() -> None:
    """What runs in the background of a shell ignores it, and what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def commands(folder, *own: str) -> list[subprocess.Popen]:
    """A job of `softprompt train`, a process for each of `own` flags, set to write to `folder`."""
    address, started = free_address(), []
    for number, flag in enumerate(own):
        flags = [
            "train", "--gin_file=models/t5_1_1_embedded.gin", "--gin_file=runs/prompt_classify.gin",
            "--gin.MIXTURE_OR_TASK_NAME=embedded_sentiment", "--gin.TRAIN_STEPS=40",
            "--gin.TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 8}", "--gin.BATCH_SIZE=2",
            "--gin.LOG_PERIOD=1", f"--gin.MODEL_DIR={folder}", f"--coordinator_address={address}",
            "--num_processes=2", f"--process_id={number}", *flag.split(),
        ]  # fmt: skip
        with open(f"{folder}-{number}.txt", "a") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "softprompt", *flags],
                    env={**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    preexec_fn=hear_ctrl_c,
                )  # fmt: skip
            )
    return started


def said(folder, number=0) -> str:
    return pathlib.Path(f"{folder}-{number}.txt").read_text()


def finish(folder, processes, code=0) -> None:
    try:
        for number, process in enumerate(processes):
            assert process.wait(timeout=900) == code, said(folder, number)
    finally:
        for process in processes:
            process.kill()


def after(folder, processes, step, number, how: signal.Signals) -> float:
    """Sends process NUMBER a signal once `step` is logged; returns when."""
    deadline = time.monotonic() + 600
    while f"step {step}/" not in said(folder):
        assert all(process.poll() is None for process in processes), said(folder)
        assert time.monotonic() < deadline, said(folder)
        time.sleep(0.02)
    processes[number].send_signal(how)
    return time.monotonic()


def prompt_of(folder) -> np.ndarray:
    return checkpoint.read(folder / "prompts" / "best.safetensors")[0]["prompt"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process on one device."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    finish(folder, start(folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("model", [1, 8])
def test_two_processes_train_what_one_device_does(alone, tmp_path, model):
    """With model=8 every matrix is spread over both processes, and both need every row."""
    folder = tmp_path / "run"
    finish(folder, start(folder, 2, model))
    own = ["slice(0, 4, None)", "slice(4, 8, None)"] if model == 1 else ["slice(0, 8, None)"] * 2
    # Only process 0 speaks through `say`; both print what this script prints.
    prints = set()
    for number in (0, 1):
        assert f"devices 8 rows {own[number]}" in said(folder, number)
        prints.add(said(folder, number).split("fingerprint ")[1])
    assert prints == {said(alone).split("fingerprint ")[1]}
    assert "step 8/8" in said(folder) and "step 8/8" not in said(folder, 1)
    # float32 sums in another order; the numbers themselves reach 3, a step moves them by 0.3.
    np.testing.assert_allclose(prompt_of(folder), prompt_of(alone), atol=2e-4)
    assert np.abs(prompt_of(alone)).max() > 0.1
    names = lambda at: sorted(  # noqa: E731
        str(p.relative_to(at)) for p in at.rglob("*") if p.is_file() and not p.match("events.*")
    )
    assert names(folder) == names(alone)
    assert len(list(folder.glob("events.*"))) == 1
    lines = [json.loads(x)["step"] for x in (folder / "train.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 9)), "written once"


@pytest.mark.slow
def test_a_lost_process_stops_the_others_and_the_job_goes_on(alone, tmp_path):
    folder = tmp_path / "run"
    processes = start(folder, 2, pause=0.1)
    killed = after(folder, processes, 5, 1, signal.SIGKILL)
    assert processes[0].wait(timeout=60) != 0
    assert time.monotonic() - killed < 60
    # Whoever notices first says so: the failed collective, the coordination service, or gloo (on
    # CPUs), which ends the process itself when a half-sent collective meets the next one.
    signs = ("another one was lost", "another task died", "gloo::EnforceNotMet")
    assert any(sign in said(folder) for sign in signs), said(folder)
    finish(folder, start(folder, 2))
    assert "resuming from step 4" in said(folder)
    np.testing.assert_allclose(prompt_of(folder), prompt_of(alone), atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("number, how", [(1, signal.SIGTERM), (0, signal.SIGINT)])
def test_a_signal_to_any_process_stops_all_at_one_step(alone, tmp_path, number, how):
    """Also to one that neither writes nor speaks."""
    folder = tmp_path / "run"
    processes = start(folder, 2, pause=0.5)
    after(folder, processes, 2, number, how)
    finish(folder, processes)
    step = int(said(folder).split("stopped by a signal after step ")[1].split(";")[0])
    assert checkpoint.steps(folder)[-1] == step < 8
    finish(folder, start(folder, 2))
    assert f"resuming from step {step}" in said(folder)
    np.testing.assert_allclose(prompt_of(folder), prompt_of(alone), atol=2e-4)


@pytest.mark.parametrize(
    "own, messages",
    [
        (
            ("--gin.SEED=0", "--gin.SEED=1"),
            ["process 1 of 2 has SEED 1, process 0 has 0: start all processes with the same"] * 2,
        ),
        (
            ("--data_dir=", "--data_dir=/nowhere"),
            ["process 1 of 2: --data_dir '/nowhere'", "--data_dir '/nowhere': there is no such"],
        ),
        (("--gin.LOG_PERIOD=0",) * 2, ["LOG_PERIOD is 0, expected an integer of at least 1"] * 2),
    ],
)
def test_a_job_that_cannot_run_ends_at_once_in_one_sentence_each(tmp_path, own, messages):
    folder = tmp_path / "run"
    finish(folder, commands(folder, *own), 2)
    for number, message in enumerate(messages):
        [line] = said(folder, number).splitlines()
        assert line.startswith("softprompt: ") and message in line
    assert not folder.exists()


@pytest.mark.slow
def test_other_data_are_refused_and_ctrl_c_ends_a_job_with_143(tmp_path):
    for name, label in (("a.jsonl", "good"), ("b.jsonl", "bad")):
        rows = [{"text": f"number {i}", "label": "good" if i else label} for i in range(8)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "run"
    both = [f"--train_file={tmp_path / name}.jsonl --labels=good,bad" for name in "ab"]
    finish(folder, commands(folder, *both), 2)
    for number in (0, 1):
        assert "process 1 of 2 has examples " in said(folder, number).splitlines()[-1]
    processes = commands(folder, both[0], both[0])
    after(folder, processes, 2, 1, signal.SIGINT)
    finish(folder, processes, 143)
    assert "Traceback" not in said(folder, 0) + said(folder, 1)
    assert checkpoint.steps(folder)


def test_who_waits_for_the_others_says_so_and_hears_ctrl_c():
    code = (
        "import sys; from softprompt import hosts, __main__; hosts.REMINDER = 0.2; "
        "hosts.START_TIMEOUT = int(sys.argv[1]); "
        "__main__.main(['train', '--coordinator_address=127.0.0.1:9', '--num_processes=2', "
        "'--process_id=1'])"
    )
    for seconds, expected in ((1, 2), (600, -signal.SIGINT)):
        waiting = subprocess.Popen(
            [sys.executable, "-c", code, str(seconds)], env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c,
        )  # fmt: skip
        assert "process 1 of 2 waits for the others at 127.0.0.1:9" in waiting.stderr.readline()
        if expected < 0:
            waiting.send_signal(signal.SIGINT)
        assert waiting.wait(timeout=60) == expected
        last = waiting.stderr.read().splitlines()[-1:]
        if expected > 0:
            assert last[0].startswith("softprompt: the job of several processes did not start: ")


def test_what_differs_is_shown_where_it_differs():
    assert hosts._apart("1", "20") == ["1", "20"]
    here, there = hosts._apart("x" * 90 + "a" + "y" * 90, "x" * 90 + "b")
    assert here == "…" + "x" * 20 + "a" + "y" * 38 + "…" and there == "…" + "x" * 20 + "b"


def test_flags_that_do_not_fit_together_are_named():
    with pytest.raises(ValueError, match="got no --num_processes, --process_id; --distributed"):
        hosts.start("127.0.0.1:1234")
    with pytest.raises(ValueError, match="--process_id is 2, expected 0 to 1"):
        hosts.start("127.0.0.1:1234", 2, 2)
    with pytest.raises(ValueError, match="'1234', expected HOST:PORT"):
        hosts.start("1234", 2, 0)
    for address in ("127.0.0.1", "127.0.0.1:0", "127.0.0.1:99999"):
        with pytest.raises(ValueError, match=f"'{address}', expected HOST:PORT"):
            hosts.start(address, 2, 0)
    assert not hosts.several() and hosts.first()


def test_a_cluster_that_is_not_there_is_one_sentence():
    code = (
        "import sys; from softprompt.__main__ import main; "
        "sys.exit(main(['train', '--distributed=auto']))"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMPI", "KUBERN"))}
    run = subprocess.run(
        [sys.executable, "-c", code], env={**clean, "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 2
    assert "did not start" in run.stderr and "give --coordinator_address" in run.stderr
    assert "Traceback" not in run.stderr


def test_the_command_line_knows_the_flags():
    args = command.parser().parse_args(
        ["train", "--coordinator_address=a:1", "--num_processes=2", "--process_id=1"]
    )
    assert (args.coordinator_address, args.num_processes, args.process_id) == ("a:1", 2, 1)


def test_a_process_that_saves_nothing_ends_on_sigterm_with_143():
    with pytest.raises(mistakes.Terminated) as error:
        hosts._terminate(signal.SIGTERM, None)
    assert mistakes.told(error.value) == ("stopped by SIGTERM", 143)
    assert hosts._reason(error.value) == ("process 0 of 1: stopped by SIGTERM", 143)


def test_alone_every_function_is_the_plain_thing():
    assert hosts.shared(lambda: {"a": 1}) == {"a": 1}
    with pytest.raises(ValueError, match="plain"):
        hosts.shared(lambda: (_ for _ in ()).throw(ValueError("plain")))
    np.testing.assert_array_equal(hosts.fetch(jax.numpy.arange(3)), np.arange(3))
    assert partition.local_rows(partition.make_mesh(devices=1), 6) == slice(0, 6)
