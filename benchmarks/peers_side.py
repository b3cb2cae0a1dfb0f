"""The sides that `peers.py` compares, each in processes of its own."""

import contextlib
import json
import pathlib
import re
import subprocess
import tempfile


class Failed(Exception):
    """A side's worker ended; the message says of what."""


class Worker:
    """A side in its own process."""

    def __init__(self, python: str, settings: dict):
        script = "t5x_worker.py" if settings["side"] == "t5x" else "worker.py"
        # A file: a pipe that nobody reads would fill up.
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [python, str(pathlib.Path(__file__).with_name(script)), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def ask(self, **call) -> dict:
        """The answer to a call; the worker's own message where it failed."""
        try:
            print(json.dumps(call), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise Failed(f"{' '.join(map(str, call.values()))}: {last_error(self._errors.read())}")
        return json.loads(line)

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._errors.close()


class Side:
    """A side's workers: ours trains in one and predicts in another on a CPU, as its commands do."""

    def __init__(self, python: str, settings: dict):
        self._training = self._predicting = Worker(python, settings)
        if settings["side"] == "ours" and settings["device"] == "cpu":
            self._predicting = Worker(python, {**settings, "training": False})

    def ask(self, **call) -> dict:
        """As of the worker that does a call's case."""
        training = call.get("case", "train") == "train"
        return (self._training if training else self._predicting).ask(**call)

    def close(self) -> None:
        self._training.close()
        if self._predicting is not self._training:
            self._predicting.close()


def last_error(text: str) -> str:
    """The message that a traceback ends with, on one line; the last line where there is none."""
    lines = text.strip().splitlines() or ["the worker ended and said nothing"]
    heads = [i for i, line in enumerate(lines) if re.match(r"[A-Za-z_][\w.]*(: |$)", line)]
    return " ".join(" ".join(lines[heads[-1] if heads else -1 :]).split())[:600]
