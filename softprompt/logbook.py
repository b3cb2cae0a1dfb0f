"""Where a run's figures go: lines on the terminal, JSON Lines, TensorBoard events."""

import contextlib
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from softprompt import checkpoint, hosts

Item = TypeVar("Item")
# The files that a run resumes, and what each of their lines holds.
FIGURES = {"train.jsonl": ("step", "loss"), "eval/metrics.jsonl": ("step",)}
# Seconds between two drawings of a bar, and between two lines of a log.
REDRAW = 0.2
SPEAK = 30.0


def say(line: str) -> None:
    """Prints a line at once, also into a pipe; of several processes the first one speaks."""
    if hosts.first():
        clear()
        print(line, flush=True)


def on_terminal() -> bool:
    """Whether standard output is a terminal that can rewrite a line."""
    return hosts.first() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


_drawn = False


def clear() -> None:
    """Takes away the bar that stands on the terminal, if there is one."""
    global _drawn
    if _drawn:
        _drawn = False
        sys.stdout.write("\r\x1b[K")
        sys.stdout.flush()


def draw(done: int, total: int | None, text: str) -> None:
    """Rewrites the terminal's last line: a bar if the total is known, then the text, cut to fit."""
    global _drawn
    bar, columns = "", shutil.get_terminal_size().columns
    if total:
        wide = min(columns // 5, 24)
        full = wide * min(done, total) // total
        bar = f"[{'#' * full}{'-' * (wide - full)}] {100 * min(done, total) // total:3d}%  "
    sys.stdout.write("\r" + f"{bar}{text}"[: columns - 1] + "\x1b[K")
    sys.stdout.flush()
    _drawn = True


class Progress:
    """How far something is, with its rate and the time left.

    On a terminal one line is rewritten; elsewhere there is a plain line every `every` seconds,
    so that a short piece of work says nothing.

    Args:
      what: said first, such as "sst2: evaluating".
      total: how many `unit` there are, None where nobody knows.
      every: seconds between plain lines; 0 prints a line at every update.
      start: how many were done before, which the rate does not count.
    """

    def __init__(
        self, what: str, total: int | None, unit: str, every: float = SPEAK, start: int = 0
    ):
        self._what, self._total, self._unit, self._every = what, total, unit, every
        self._start = start
        self._began = self._shown = time.monotonic()

    def update(self, done: int) -> None:
        """Shows that `done` of the total are done, where it is time to show anything."""
        now, terminal = time.monotonic(), on_terminal()
        finished = done == self._total
        since = now - self._shown
        if since < (REDRAW if terminal else self._every) and not (finished and terminal):
            return
        self._shown = now
        rate = (done - self._start) / max(now - self._began, 1e-9)
        text = f"{self._what}  {done:,}"
        text += f"/{self._total:,} {self._unit}" if self._total else f" {self._unit}"
        text += f"  {rate:,.1f} {self._unit}/s" if rate < 100 else f"  {rate:,.0f} {self._unit}/s"
        if self._total and rate:
            text += f"  {duration((self._total - done) / rate)} left"
        if terminal:
            draw(done, self._total, text)
        else:
            say(text)


def track(items: Iterable[Item], what: str, unit: str, total: int | None = None) -> Iterator[Item]:
    """The items, with a `Progress` that counts those taken and is gone afterwards."""
    progress = Progress(what, total, unit)
    try:
        for done, item in enumerate(items):
            if done:
                progress.update(done)
            yield item
    finally:
        clear()


def duration(seconds: float) -> str:
    """`95` as `1m35s`."""
    seconds = round(seconds)
    hours, minutes = divmod(seconds // 60, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds % 60:02}s" if minutes else f"{seconds}s"


def size(count: int) -> str:
    """`102400` bytes as `100.0 KiB`."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{int(value)} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024


class Logbook:
    """Figures by step, in `<model_dir>/<name>.jsonl` and TensorBoard, cut back when a run resumes.

    With `model_dir` None nothing is written, nor by any but the first of several processes. The run
    goes on from the step `start`, its evaluations from `judged`.

    Raises:
      ValueError: `model_dir` holds files of these names that no run wrote; they stay as they are.
    """

    def __init__(self, model_dir: str | os.PathLike | None, start: int, judged: int | None = None):
        self.folder = None if model_dir is None or not hosts.first() else pathlib.Path(model_dir)
        self._events = None
        self._start = start
        self._clock = (start, time.monotonic())
        self._said = ("", "")
        self._drawn = 0.0
        if self.folder is not None:
            _cut_after(_read_figures(self.folder), start, start if judged is None else judged)

    def write(self, name: str, step: int, figures: Mapping[str, float]) -> None:
        """Appends figures at `step` to `<name>.jsonl` and to the TensorBoard events."""
        if self.folder is None:
            return
        path = self.folder / f"{name}.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **figures}) + "\n")
            self._write_events(pathlib.PurePath(name).parts[0], step, figures)
        except OSError as error:
            raise ValueError(f"cannot write to {str(self.folder)!r}: {error.strerror}") from error

    def _write_events(self, prefix: str, step: int, figures: Mapping[str, float]) -> None:
        # tensorboardX's SummaryWriter writes in a thread, where a full disk would go unheard.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        if self._events is None:
            self._events = EventsWriter(str(self.folder / "events"))
            if self._start:  # TensorBoard forgets what an interrupted run logged after this.
                restart = SessionLog(status=SessionLog.START)
                self._events.write_event(Event(step=self._start + 1, session_log=restart))
        for key, value in figures.items():
            summary = scalar(f"{prefix}/{key}", value)
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        self._events.flush()

    def restart(self, step: int) -> None:
        """Time counts from here, at `step`."""
        self._clock = (step, time.monotonic())

    def begin(self, step: int) -> None:
        """Says that `step`, the first, is done; the rate and the time left count from here."""
        now = time.monotonic()
        say(f"step {step}  compiled and done in {now - self._clock[1]:.1f} s")
        self._clock = (step, now)

    def leave_out(self, seconds: float) -> None:
        """Counts a step that took `seconds`, most of them to compile, neither in the rate nor so.

        The rate is that of all others.
        """
        first, began = self._clock
        self._clock = (first + 1, began + seconds)

    def progress(self, step: int, last: int, loss: float, rates: Mapping[str, float]) -> None:
        """Step, loss, rates (of `throughput.Meter`, or none), time left: a line, or a bar."""
        speed = ""
        if rates:
            speed = f"{rates['tokens_per_second']:,.0f} tokens/s  MFU {100 * rates['mfu']:.0f}%  "
            speed += f"data wait {100 * rates['data_wait']:.1f}%"
        self._said = (f"loss {loss:.4f}", speed)
        if on_terminal() and step < last:
            self.tick(step, last)
        else:
            say(self._line(step, last))

    def due(self) -> bool:
        """Whether a terminal's bar has not moved for a while (always False in a log)."""
        return time.monotonic() - self._drawn > REDRAW and on_terminal()

    def tick(self, step: int, last: int) -> None:
        """Moves the terminal's bar to `step`, with the figures that were last told."""
        self._drawn = time.monotonic()
        draw(step, last, self._line(step, last))

    def _line(self, step: int, last: int) -> str:
        first, began = self._clock
        loss, speed = self._said
        parts = [f"step {step}/{last}", loss]
        if step > first:
            rate = (step - first) / max(time.monotonic() - began, 1e-9)
            parts += [f"{rate:.2f} steps/s", f"{duration((last - step) / rate)} left", speed]
        return "  ".join(part for part in parts if part)

    def close(self) -> None:
        """Closes the events, and takes the bar away."""
        clear()
        if self._events is not None:
            self._events.close()


def check_figures(model_dir: str | os.PathLike) -> None:
    """Raises where a file in MODEL_DIR has a log's name but was not written by a run."""
    _read_figures(pathlib.Path(model_dir))


def _read_figures(folder: pathlib.Path) -> dict[pathlib.Path, list[tuple[int, str]]]:
    """The step and the text of each line of a run's files; a torn last line is left out."""
    paths = {folder / name: keys for name, keys in FIGURES.items()}
    return {path: _read_lines(path, keys) for path, keys in paths.items() if path.exists()}


def _read_lines(path: pathlib.Path, keys: Sequence[str]) -> list[tuple[int, str]]:
    *lines, last = path.read_text(encoding="utf-8", errors="replace").split("\n")
    found = []
    for number, line in enumerate([*lines, last] if last else lines, 1):
        row = None
        with contextlib.suppress(ValueError):
            row = json.loads(line)
        if isinstance(row, dict) and all(isinstance(row.get(key), int | float) for key in keys):
            found.append((row["step"], line))
        elif row is not None or number <= len(lines):
            raise ValueError(
                f"{str(path)!r} is not one that a run wrote: line {number} is no object with "
                f"{' and '.join(keys)}; use another MODEL_DIR, or move the file elsewhere"
            )
    return found


def _cut_after(files: Mapping[pathlib.Path, list[tuple[int, str]]], step: int, judged: int) -> None:
    """Drops lines of steps after `step`, and evaluations after `judged`: they are written anew."""
    for path, lines in files.items():
        last = min(step, judged) if path.parent.name == "eval" else step
        kept = "".join(f"{line}\n" for at, line in lines if at <= last)
        checkpoint.write_atomically(path, kept.encode())
