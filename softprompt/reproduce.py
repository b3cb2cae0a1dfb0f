"""`softprompt reproduce`: a table or figure of Lester et al. 2021 on the backbone and data at hand.

The runs of a plan (`experiments`) are those of `sweep`, `transfer`, `members` and `voting`, so a
stopped command goes on where it was. What they leave is set beside the figures that the paper
prints (`published`).
"""

from collections.abc import Callable, Iterator
from typing import Any

from softprompt import (
    compare,
    ensembles,
    members,
    needs,
    planning,
    portrait,
    sweep,
    transfer,
)
from softprompt.experiments import (
    COUNTS,
    ENSEMBLE,
    PORTRAIT,
    SWEEP,
    TRANSFER,
    Options,
    Plan,
    plan,
)
from softprompt.logbook import say, size


def describe(planned: Plan) -> Iterator[str]:
    """What would run, what could not, and, unless all is there, what it needs: it is measured."""
    yield f"{planned.name}: {planned.experiment.title}. The paper: {planned.experiment.paper}."
    yield from (f"reduced: {text}" for text in planned.reduced)
    each = len(planned.done) // max(1, len(planned.runs))  # Results of a run.
    for i, text in enumerate(planned.runs):
        made = each and all(planned.done[each * i : each * (i + 1)])
        yield f"{'done' if made else 'run'}: {text}"
    yield from (f"cannot be run: {text}" for text in planned.missing)
    left = planned.done.count(False)
    if planned.done:
        yield f"{len(planned.done)} results, {left} still to be made, in {planned.folder}"
    for group in planned.groups:
        cost = needs.of(group)
        together = f" with {group.together} at once" if group.together > 1 else ""
        alone = ", as if one after another" if group.together > 1 else ""
        yield (
            f"needs: {group.runs} x {group.name}, {size(cost.peak)} per device at the peak"
            f"{together}, about {cost.hours:.2g} hours of training in all{alone} "
            f"({cost.seconds_per_step:.3g} s a step by {needs.STEPS} measured ones, "
            f"{cost.train_steps} steps; evaluation and compilation come to it)"
        )


def run(name: str, options: Options, plan_only: bool = False) -> bool:
    """Says the plan, runs it, and writes `reproduce.md` and `.csv` beside the paper's figures.

    Returns False if SIGTERM stopped it; the same command goes on.
    """
    planned = plan(name, options)
    for line in describe(planned):
        say(line)
    if plan_only:
        return True
    doing: dict[str, Callable[[Plan], bool]] = {
        SWEEP: lambda p: sweep.sweep(p.files, p.bindings),
        PORTRAIT: lambda p: sweep.sweep(p.files, p.bindings),
        TRANSFER: lambda p: transfer.transfer(p.files, p.bindings),
        ENSEMBLE: _run_ensembles,
        COUNTS: lambda p: True,
    }
    kind = planned.experiment.kind
    if not doing[kind](planned):
        return False
    measured = {
        SWEEP: lambda: compare.of_summary(planned.folder, ("line", "point", "task")),
        PORTRAIT: lambda: compare.of_summary(planned.folder, ("line", "point", "task")),
        TRANSFER: lambda: compare.of_summary(
            planned.folder, ("source", "target", "figure", "method")
        ),
        ENSEMBLE: lambda: compare.of_ensembles(planned.folder, list(planned.tasks)),
        COUNTS: compare.counts,
    }[kind]()
    more: list[str] = []
    if kind == PORTRAIT:
        runs = [str(folder) for folder in planned.folders]
        more = portrait.run(
            runs, options.backbones[0], planned.folder / "analysis", options.vocabulary_file
        )
    if kind == COUNTS:
        more = compare.methods()
    form = "reduced" if options.small and kind != COUNTS else "the paper's settings"
    if options.bindings and form != "reduced":
        form += " but for what was given"
    about: dict[str, Any] = {
        "title": f"{planned.experiment.title} ({name})",
        "backbone": ", ".join(options.backbones) if kind != COUNTS else "T5 1.1, shapes alone",
        "form": form,
        "reduced": planned.reduced,
        "given": [f"{name}={value}" for name, value in options.bindings],
        "missing": planned.missing,
    }
    say(compare.write(name, planned.folder, about, measured, more))
    return True


def _run_ensembles(planned: Plan) -> bool:
    """Trains each task's population, then lets its prompts vote."""
    for task, own in planned.tasks.items():
        say(f"--- {task}")
        if not members.run(planned.files, [*planned.bindings, *own]):
            say(f"stopped during {task}; the same command goes on from here")
            return False
        given = [*planned.bindings, *own]
        evaluation, *found = ensembles.vote_of(planned.files, given, planned.folder / task, task)
        if not ensembles.is_voted(evaluation, *found):  # One of others is replaced.
            (evaluation.folder / "result.json").unlink(missing_ok=True)
            planning.do(evaluation, "eval")
    return True
