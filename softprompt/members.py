"""`softprompt population`: members from gin's lists, one run, and their ranking.

A member is the run that `softprompt train` gives with the member's own settings, to the letter:
its configuration is parsed and `launch.train` called for it, up to the training itself, which
`population.fit` does for all of them at once.
"""

import contextlib
import csv
import dataclasses
import hashlib
import inspect
import io
import itertools
import json
import math
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from softprompt import checkpoint, config, launch, population, provenance, report
from softprompt import train as training
from softprompt.inputs import Shared
from softprompt.logbook import say
from softprompt.population import Member, Outcome
from softprompt.settings import are_settings, check_type
from softprompt.sweep import spread

INIT = "INIT"
TASK = "MIXTURE_OR_TASK_NAME"
SEED = "SEED"
# Gin's lists, the setting of each, and how a folder's name spells it.
AXES = {
    "TASKS": (TASK, ""),
    "INITS": (INIT, ""),
    "PROMPT_LENGTHS": ("PROMPT_LENGTH", "length"),
    "LEARNING_RATES": ("LEARNING_RATE", "rate"),
    "SEEDS": (SEED, "seed"),
}
# Of the population: what one of its members would have for itself does nothing.
PLAN = (*AXES, "MEMBERS", "POPULATION_DIR", "MODEL_DIR")
# Bytes of a member's name; file systems have names of 255.
LONGEST = 200
SHOWN = (TASK, "PROMPT_LENGTH", "LEARNING_RATE", SEED)
Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Planned:
    """A member to be: its folder's name, its own settings, and those that its table shows."""

    name: str
    own: Settings
    shown: Settings

    def group(self) -> tuple:
        """What members that differ in their seed alone have in common."""
        settings = {**self.shown, **self.own}
        return tuple(sorted((k, str(v)) for k, v in settings.items() if k != SEED))


def plan(macros: Settings) -> list[dict[str, Any]]:
    """The settings of every member, from gin's macros.

    Raises:
      ValueError: one of the lists is none, or empty, or two members have the same name.
    """
    lists: dict[str, Sequence[Any]] = {}
    for name, (setting, _) in AXES.items():
        values = macros.get(name)
        if values is None:
            continue
        if not isinstance(values, list | tuple) or not values:
            raise ValueError(f"{name} is {values!r}, expected a list such as [0, 1] or None")
        lists[setting] = values
    extra = macros.get("MEMBERS")
    if extra is None:
        extra = [{}]
    if not are_settings(extra) or not extra:
        raise ValueError(f"MEMBERS is {extra!r}, expected a list of {{'NAME': value, …}} or None")
    found = []
    for one in extra:
        if odd := [name for name in PLAN if name in one]:
            raise ValueError(f"MEMBERS: {one!r} has {', '.join(odd)}, expected settings of one run")
        axes = {k: v for k, v in lists.items() if k not in one}
        for values in itertools.product(*axes.values()):
            found.append({**dict(zip(axes, values, strict=True)), **one})
    for own in found:
        check_type(INIT, own.get(INIT, ""), str, "the name of a gin file")
    for name in AXES:
        values = [*(macros.get(name) or [])]
        if twice := [value for value in values if values.count(value) > 1]:
            raise ValueError(f"{name} has {twice[0]!r} twice, expected different values")
    names = [name_of(own) for own in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two members of the population have the name {', '.join(twice)}")
    return found


def name_of(own: Settings) -> str:
    """A folder's name that tells the settings: `embedded_sentiment-length20-seed0`.

    A long one is cut, and a digest of all settings put behind it.
    """
    words = dict(AXES.values())
    order = [*words, *sorted(k for k in own if k not in words)]
    parts = []
    for setting in order:
        if setting in own:
            value = own[setting]
            text = pathlib.PurePath(value).stem if setting == INIT else str(value)
            parts.append(words.get(setting, setting.lower() + "_") + text)
    name = re.sub(r"[^\w.+-]+", "_", "-".join(parts)) or "member"
    if len(name.encode()) > LONGEST:
        digest = hashlib.sha256(repr(sorted(own.items())).encode()).hexdigest()[:8]
        name = f"{name.encode()[:LONGEST].decode(errors='ignore')}-{digest}"
    return name


def population_members(
    files: Sequence[str], bindings: Sequence[tuple[str, str]], search_paths: Sequence[str]
) -> Iterator[tuple[Planned, Mapping[str, Any]]]:
    """Each member, and the arguments of `train.fit` that its own configuration leads to."""
    config.parse(files, bindings, search_paths, complete=False)
    macros = config.macros()
    settings = plan(macros)
    shared = Shared()
    if isinstance(macros.get("POPULATION_DIR"), str):
        root = pathlib.Path(macros["POPULATION_DIR"])
    else:
        raise ValueError("a population needs a folder: give --gin.POPULATION_DIR=…")
    for own in settings:
        name = name_of(own)
        init = [own[INIT]] if INIT in own else []
        given = [(k, repr(v)) for k, v in own.items() if k != INIT]
        given.append(("MODEL_DIR", repr(str(root / name))))
        try:
            config.parse([*files, *init], [*bindings, *given], search_paths)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        own_macros = config.macros()
        shown = {k: own_macros[k] for k in SHOWN if k in own_macros}
        arguments: dict[str, Any] = {}

        def collect(*args: Any, _into: dict = arguments, **kwargs: Any) -> training.Result:
            _into.update(inspect.signature(training.fit).bind(*args, **kwargs).arguments)
            return training.Result(0, {}, {}, 0, None, {}, interrupted=True)

        try:
            with config.errors():
                config.configured(launch.train)(fit=collect, shared=shared)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        yield Planned(name, own, shown), arguments


def run(
    files: Sequence[str],
    bindings: Sequence[tuple[str, str]] = (),
    search_paths: Sequence[str] = (),
) -> bool:
    """Trains the population; writes its ranking, summary and report to POPULATION_DIR.

    Nothing is written where one of the members is refused. Returns False if SIGTERM stopped it;
    the same command goes on.
    """
    planned: list[Planned] = []
    members: list[Member] = []
    backbone = None
    said = io.StringIO()
    with contextlib.redirect_stdout(said), provenance.all_or_none():
        for one, arguments in population_members(files, bindings, search_paths):
            if backbone is not None and arguments["backbone"] is not backbone:
                raise ValueError(f"{one.name}: a population has one backbone, this is another")
            backbone = arguments["backbone"]
            planned.append(one)
            members.append(Member.of(one.name, arguments))
    # What is said of every member is said once.
    for line in dict.fromkeys(said.getvalue().splitlines()):
        if not line.startswith("backbone "):
            say(line)
    say(
        f"{len(members)} prompts over the backbone {backbone.name} (fingerprint "
        f"{backbone.fingerprint}), mesh {dict(backbone.mesh.shape)}"
    )
    outcomes = population.fit(backbone, members)
    for one, outcome in zip(members, outcomes, strict=True):
        if outcome.status != population.INTERRUPTED:
            report.attempt(one.model_dir, backbone)
    folder = pathlib.Path(members[0].model_dir).parent
    text = write(folder, planned, outcomes)
    if any(outcome.status == population.INTERRUPTED for outcome in outcomes):
        return False
    say(f"{text}\n{len(outcomes)} prompts in {folder}: population.csv, summary.md, report.html")
    return True


def write(folder: pathlib.Path, planned: Sequence[Planned], outcomes: Sequence[Outcome]) -> str:
    """Writes the ranking and the summary over seeds; returns the latter."""
    scored = []
    for one, outcome in zip(planned, outcomes, strict=True):
        score = outcome.result.best_metric
        scored.append((math.nan if score is None else score, one, outcome))
    ranked = sorted(scored, key=lambda x: (x[1].shown.get(TASK), np.nan_to_num(-x[0], nan=np.inf)))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    settings = list(dict.fromkeys(k for one in planned for k in (*one.shown, *one.own)))
    writer.writerow(
        ["rank", "name", *(k.lower() for k in settings), "score", "best_step", "last_step",
         "status", "figures"]
    )  # fmt: skip
    ranks: dict[Any, int] = {}
    for score, one, outcome in ranked:
        task, result = one.shown.get(TASK), outcome.result
        ranks[task] = ranks.get(task, 0) + 1
        values = {**one.shown, **one.own}
        writer.writerow(
            [ranks[task], one.name, *(values.get(k, "") for k in settings), f"{score:.4f}",
             result.best_step, result.step, outcome.status,
             json.dumps(result.metrics, sort_keys=True)]
        )  # fmt: skip
    checkpoint.write_atomically(folder / "population.csv", text.getvalue().encode())
    header, listed = _summary(scored)
    lines = [header, ["---"] * len(header), *listed]
    summary = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    checkpoint.write_atomically(folder / "summary.md", summary.encode())
    provenance.write_of_many(folder / "population.json", {"header": header, "summary": listed})
    report.attempt(folder)
    return summary


def _summary(
    scored: Sequence[tuple[float, Planned, Outcome]],
) -> tuple[list[str], list[list[str]]]:
    """Mean ± sample standard deviation over seeds of equal settings, the best first by task.

    A header, and a row per setting.
    """
    groups: dict[tuple, list[tuple[float, Planned, Outcome]]] = {}
    for score, one, outcome in scored:
        groups.setdefault(one.group(), []).append((score, one, outcome))
    settings = list(
        dict.fromkeys(k for _, one, _ in scored for k in (*one.shown, *one.own) if k != SEED)
    )
    rows = []
    for found in groups.values():
        scores = [score for score, *_ in found]
        diverged = any(outcome.status == population.DIVERGED for *_, outcome in found)
        shown = "–" if math.isnan(sum(scores)) and not diverged else spread(scores, 2)
        best = max(found, key=lambda x: np.nan_to_num(x[0], nan=-np.inf))[1]
        values = {**best.shown, **best.own}
        cells = [*(str(values.get(k, "")) for k in settings)]
        cells += [shown, str(len(found)), best.name]
        order = (str(values.get(TASK)), np.nan_to_num(-np.mean(scores), nan=np.inf))
        rows.append((order, cells))
    header = [*(k.lower() for k in settings), "score", "seeds", "best"]
    return header, [cells for _, cells in sorted(rows)]
