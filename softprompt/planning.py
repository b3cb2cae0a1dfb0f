"""Runs of a plan (a sweep, a transfer): what configures one, what it was, and what it left.

Every run is the run that `softprompt train` (or `baseline`) gives with its own files and bindings,
in a folder of its own; finished ones are kept, an interrupted one goes on from its checkpoint.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from softprompt import (
    checkpoint,
    config,
    content,
    data,
    launch,
    predict,
    report,
    selection,
    signals,
    train_settings,
)
from softprompt import train as training
from softprompt.logbook import duration, say
from softprompt.report_many import folder_name
from softprompt.settings import are_texts
from softprompt.tasks import sources

BINARIES = ("train", "baseline")
# The macro that names a binary's output folder.
OUTPUT = {"train": "MODEL_DIR", "baseline": "EVAL_OUTPUT_DIR", "eval": "EVAL_OUTPUT_DIR"}
# Macros that say which runs there are and where they go: a finished run holds in a larger plan too.
PLAN = (
    *("SWEEP_DIR", "TITLE", "AXIS", "POINTS", "LINES", "TASKS", "SEEDS"),
    *("TRANSFER_DIR", "SOURCES", "TARGETS", "TARGET_SPLIT", "METHODS"),
    *set(OUTPUT.values()),
)
Settings = Mapping[str, Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Run:
    """One combination, the gin files and bindings that make it, and its folder.

    What flags say goes over the settings `of_task`, not over the others.
    """

    line: str
    point: str
    task: str
    seed: int
    settings: Sequence[str]
    folder: pathlib.Path
    of_task: Sequence[str] = ()

    def __str__(self) -> str:
        names = [self.line, self.point, self.task, f"seed {self.seed}"]
        return ", ".join(name for name in names if name)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a finished run left: its figures, their mean, and how many seconds it took.

    Of a run that was stopped and went on they are those of its last part.
    """

    run: Run
    score: float
    figures: Mapping[str, float]
    seconds: float
    diverged: bool = False


def settings_of(name: str, value: Any) -> Settings:
    """`value`, which must map names to lists of gin files and bindings; else an error.

    Names come back as text; each must have a folder of its own.
    """
    if not isinstance(value, Mapping) or not value or not all(map(are_texts, value.values())):
        raise ValueError(
            f"{name} is {value!r}, expected {{'a name': ['file.gin', 'NAME=value', …], …}}"
        )
    check_folders(name, map(str, value))
    return {str(own): settings for own, settings in value.items()}


def check_folders(what: str, names: Iterable[str]) -> None:
    """Raises where a name cannot be a folder's, or two of them have the same folder."""
    folders: dict[str, str] = {}
    for name in names:
        folder = folder_name(name)
        if folder in (".", ".."):
            raise ValueError(f"{what} has the name {name!r}, expected one that a folder can have")
        if folder in folders:
            raise ValueError(
                f"{what} has the names {folders[folder]!r} and {name!r}, which share the folder "
                f"{folder!r}: expected names that differ in more than punctuation"
            )
        folders[folder] = name


def seeds_of(value: Any) -> Sequence[int]:
    """`value`, which must be a list of integers; else an error."""
    good = isinstance(value, Sequence) and all(type(s) is int for s in value)
    if not good or not value or len(set(value)) < len(value):
        raise ValueError(f"SEEDS is {value!r}, expected different integers such as [0, 1, 2]")
    return value


def check_split(tasks: Iterable[Any], split: str) -> None:
    """Raises where a task lacks the split, or its data that only a local folder can have."""
    for task in tasks:
        data.check_split(task, split)
        sources.check_local(task.name, split)


def check_taken(
    planned: Sequence[Run],
    files: Sequence[str],
    bindings: Sequence[tuple[str, str]],
    search_paths: Sequence[str],
) -> None:
    """Raises where a gin file of one's own sets what the files that all runs name set after it.

    What all of them set by name, NAME=value, is plain to see.
    """
    own = {name for file in files for name in config.set_in(file, search_paths)}
    named = [{s.split("=")[0] for s in (*run.settings, *run.of_task)} for run in planned]
    own -= {*PLAN, *(name for name, _ in bindings), *set.intersection(*named)}
    config.parse(files, (), search_paths, complete=False)
    left = {name: value for name, value in config.macros().items() if name in own}
    left = {name: value for name, value in left.items() if str(value)[:1] not in "%@"}
    for run in planned:
        if not left:
            return
        _parse(run, files, bindings, search_paths)
        left = {k: v for k, v in left.items() if config.macros()[k] != v}
    for name, value in left.items():
        raise ValueError(
            f"{name} is {value!r} in the gin files given, but every run names files that set it "
            f"after them ({planned[-1]}: {config.macros()[name]!r}); give --gin.{name}=… in its "
            f"place, or set it where those files are named"
        )


def check_known(bindings: Sequence[tuple[str, str]], names: Collection[str]) -> None:
    """Raises where a binding names a macro that is not among the `names` that the runs know."""
    if odd := [name for name, _ in bindings if "." not in name and name not in names]:
        raise ValueError(f"--gin.{odd[0]}: no run of this sweep knows the name {odd[0]!r}")


def check_free(bindings: Sequence[tuple[str, str]], **plan: Settings) -> None:
    """Raises where a binding names what SEEDS, or all settings of one of `plan`, set for each run.

    What only some of them set, such as the steps of one method, is free for the others.
    """
    takers = {"SEED": "SEEDS"}
    for who, settings in plan.items():
        names = [{s.split("=", 1)[0] for s in own if "=" in s} for own in settings.values()]
        takers |= dict.fromkeys(set.intersection(*names), who)
    for name, _ in bindings:
        if name in takers:
            raise ValueError(
                f"--gin.{name}: {takers[name]} sets {name} for every run; give --gin."
                f"{takers[name]} in its place"
            )


def _parse(run: Run, files, bindings, search_paths) -> tuple[list[str], list[tuple[str, str]]]:
    """Makes gin's configuration that of the run, but for its folder; its files and bindings."""
    every = [*run.settings, *run.of_task]
    extra = [s for s in every if s.endswith(".gin") and "=" not in s]
    if bad := [s for s in every if s not in extra and "=" not in s]:
        raise ValueError(f"{run}: {bad[0]!r} is neither a .gin file nor NAME=value")
    own, of_task = (
        [(name, value) for name, equals, value in (s.partition("=") for s in part) if equals]
        for part in (run.settings, run.of_task)
    )
    # What the command line says holds for every run that knows the name: over the files and what
    # suits a task, but not over the points.
    given = {name for name, _ in bindings}
    own += [pair for pair in of_task if pair[0] not in given]
    files = [*files, *extra]
    config.parse(files, (), search_paths, complete=False)
    bindings = [*known(bindings), *own]
    config.parse(files, bindings, search_paths, complete=False)
    return files, bindings


def configure(run: Run, files, bindings, search_paths) -> str:
    """Makes gin's configuration that of the run; returns the binary that it configures."""
    files, bindings = _parse(run, files, bindings, search_paths)
    binary = config.macros()["BINARY"]
    if binary not in BINARIES:
        raise ValueError(f"{run}: BINARY is {binary!r}, expected one of {', '.join(BINARIES)}")
    config.parse(files, [*bindings, (OUTPUT[binary], str(run.folder))], search_paths)
    with naming(run), config.errors():
        check = {"train": train_settings.check, "baseline": predict.check_baseline}[binary]
        check(config.arguments(getattr(launch, binary)))
    return binary


@contextlib.contextmanager
def naming(run: Run) -> Iterator[None]:
    """Within it, a ValueError says which run it is of."""
    try:
        yield
    except training.Diverged:
        raise
    except ValueError as error:
        raise ValueError(f"{run}: {error}") from None


def known(bindings: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those whose names the configuration has."""
    return [(name, value) for name, value in bindings if "." in name or name in config.macros()]


def identity() -> str:
    """A digest of the configuration and of what it reads, less the plan and where it is written."""
    return _identity(content.of(config.macros()))


def _identity(read: Mapping[str, str | None]) -> str:
    lines = [*_lines(config.operative(), content.elsewhere(read)), json.dumps(read, sort_keys=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _lines(text: str, without: Collection[str] = ()) -> list[str]:
    """A configuration's lines, but for the plan's, those of where it is written, and `without`."""
    kept, keep = [], True
    for line in text.splitlines():
        if not line.startswith(" "):  # Else it goes on with the binding above it.
            keep = line.split(" = ")[0] not in {*PLAN, *without}
        if keep:
            kept.append(line)
    return kept


def _settings(text: str, without: Collection[str] = ()) -> dict[str, str]:
    """The bindings among a configuration's `_lines`, long ones joined."""
    return config.settings_in("\n".join(_lines(text, without)))


def finished(run: Run) -> Outcome | None:
    """What a run left that was done under the configuration in force; None where it was not."""
    path = run.folder / "result.json"
    if not path.exists():
        return None
    found = checkpoint.read_object(path)
    read = content.of(config.macros())
    if found.get("configuration") != _identity(read):
        before = run.folder / "config.gin"
        apart = content.elsewhere(read)
        was = _settings(before.read_text(encoding="utf-8"), apart) if before.is_file() else {}
        differ = checkpoint.differences(was, _settings(config.operative(), apart)) if was else []
        differ += [
            f"the content of {said}"
            for said in checkpoint.differences(found.get("content", {}), read)
        ]
        raise ValueError(
            f"{str(run.folder)!r} was made by another configuration than {run} has now "
            f"({'; '.join(differ[:4]) or 'its config.gin does not tell'}); give the same settings "
            f"and data to go on, use another output folder, or delete that one"
        )
    score = math.nan if found["score"] is None else found["score"]
    return Outcome(run, score, found["figures"], found["seconds"], found.get("diverged", False))


def outcomes(
    planned: Sequence[Run], files, bindings, search_paths, what: str
) -> Iterator[tuple[Outcome | None, bool]]:
    """What each run left, found or made now, and whether now; gin's configuration is its own then.

    None, the last one, stands for a run that SIGTERM stopped. `what` is a run called.
    """
    spent: list[float] = []
    for number, run in enumerate(planned, 1):
        binary = configure(run, files, bindings, search_paths)
        if found := finished(run):
            yield found, False
            continue
        left = ""
        if spent:
            seconds = sum(spent) / len(spent) * (len(planned) - number + 1)
            left = f", about {duration(seconds)} left"
        say(f"--- {what} {number}/{len(planned)}: {run}{left}")
        made = do(run, binary)
        signals.clear_caches()
        if made is None:
            say(f"stopped during {run}; the same command goes on from here")
            yield None, True
            return
        spent.append(made.seconds)
        yield made, True


def do(run: Run, binary: str) -> Outcome | None:
    """Does one run; None if it was interrupted. A diverged one has no figures, and no score."""
    read = content.of(config.macros())
    ours = _identity(read)
    best_metric = config.macros().get("BEST_METRIC")
    began = time.monotonic()
    figures: Mapping[str, float]
    diverged = False
    try:
        with naming(run), config.errors():
            found = config.configured(getattr(launch, binary))()
    except training.Diverged as error:
        say(f"{run}: {error}")
        report.attempt(run.folder)
        figures, diverged = {}, True
    else:
        if binary == "train" and found.interrupted:
            return None
        figures = found.metrics if binary == "train" else found
    score = selection.choose_metric(figures, best_metric) if figures else None
    seconds = time.monotonic() - began
    record = {
        "score": score, "figures": figures, "seconds": seconds, "configuration": ours,
        "content": read, "diverged": diverged,
    }  # fmt: skip
    checkpoint.write_atomically(run.folder / "result.json", json.dumps(record, indent=2).encode())
    return Outcome(run, math.nan if score is None else score, figures, seconds, diverged)
