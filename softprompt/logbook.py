"""Where a run's figures go: lines on the terminal, JSON Lines, TensorBoard events."""

import json
import os
import pathlib
import time
from collections.abc import Mapping

from softprompt import checkpoint, hosts


def say(line: str) -> None:
    """Prints a line at once, also into a pipe; of several processes the first one speaks."""
    if hosts.first():
        print(line, flush=True)


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

    With `model_dir` None nothing is written, nor by any but the first of several processes.
    """

    def __init__(self, model_dir: str | os.PathLike | None, start: int):
        self.folder = None if model_dir is None or not hosts.first() else pathlib.Path(model_dir)
        self._events = None
        self._start = start
        self._clock = (start, time.monotonic())
        if self.folder is not None:
            for path in (self.folder / "train.jsonl", self.folder / "eval" / "metrics.jsonl"):
                _cut_after(path, start)

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

    def begin(self, step: int) -> None:
        """Sets the clock of the rate and the time left: `step` is done now (and compiled)."""
        self._clock = (step, time.monotonic())

    def progress(self, step: int, last: int, loss: float, rates: Mapping[str, float]) -> None:
        """One line: step, loss, rates (of `throughput.Meter`), time left."""
        first, began = self._clock
        rate = (step - first) / max(time.monotonic() - began, 1e-9)
        left = duration((last - step) / rate) if rate else "?"
        say(
            f"step {step}/{last}  loss {loss:.4f}  {rate:.2f} steps/s  "
            f"{rates['tokens_per_second']:,.0f} tokens/s  MFU {100 * rates['mfu']:.0f}%  "
            f"data wait {100 * rates['data_wait']:.1f}%  "
            f"{left} left"
        )

    def close(self) -> None:
        """Closes the events."""
        if self._events is not None:
            self._events.close()


def _cut_after(path: pathlib.Path, step: int) -> None:
    """Drops lines of steps after `step`, and a torn last line: a resumed run rewrites them."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    checkpoint.write_atomically(path, "".join(kept).encode())
