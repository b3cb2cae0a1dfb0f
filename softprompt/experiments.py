"""The paper's tables and figures as plans: which runs, by what files and bindings, and what lacks.

A plan is made of what there is: backbones, a family of them, data. What cannot be run is named with
its reason; nothing is replaced in silence.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from softprompt import (
    compare,
    config,
    ensembles,
    formats,
    members,
    needs,
    planning,
    standins,
    sweep,
    transfer,
)
from softprompt.tasks import builtin, sources  # noqa: F401 (the first defines the tasks)

SWEEP, TRANSFER, ENSEMBLE, COUNTS, PORTRAIT = "sweep", "transfer", "ensemble", "counts", "portrait"
Bindings = list[tuple[str, str]]
PROMPTS = 5
REDUCED_STEPS = 100
CLASS_LABELS = "prompts/from_class_labels.gin"
# Of the paper: checkpoints are chosen on the development set.
PAPER_RUN = ["runs/prompt_finetune.gin", "EVAL_PERIOD=1000"]
# Words that the prompt starts from where a task has no labels (Lester et al. 2021, footnote 7).
FREE_TEXT = {
    "super_glue_record": ["commonsense", "reasoning", "reading", "comprehension"],
    "super_glue_wsc": ["commonsense", "pronoun", "resolution"],
}
SUPER_GLUE = tuple(
    f"super_glue_{name}"
    for name in ("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc")
)
REDUCED_TASKS = ("super_glue_cb", "super_glue_copa", "super_glue_rte")
MRQA = (
    "mrqa_textbookqa", "mrqa_bioasq", "mrqa_race", "mrqa_relationextraction", "mrqa_duorc",
    "mrqa_drop",
)  # fmt: skip
# Sets that the paper has not, where a local folder has them.
MRQA_MORE = ("mrqa_squadshifts_amazon", "mrqa_squadshifts_reddit", "mrqa_subjqa_electronics")
FULL_LENGTHS = {"inputs": 512, "targets": 32}
REDUCED_LENGTHS = {"inputs": 128, "targets": 8}
EMBEDDED_LENGTHS = {"inputs": 48, "targets": 8}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One of the paper's tables or figures.

    Attributes:
      kind: what runs it.
      paper: what the paper ran for it.
      file: of gin/, for those kinds that have one.
      lines: a sweep's lines by the paper's settings.
      alone: points of a sweep over a family of backbones, where there is one backbone alone.
    """

    title: str
    kind: str
    paper: str
    file: str = ""
    lines: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    alone: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)


_TUNED = {"": [*PAPER_RUN, CLASS_LABELS]}
_ABLATION = "T5 1.1 of five sizes, eight SuperGLUE tasks, three seeds, 30,000 steps"
EXPERIMENTS = {
    "figure1": Experiment(
        "Prompt tuning, model tuning and prompt design by model size", SWEEP,
        f"{_ABLATION}; prompt design is GPT-3's", "sweeps/model_size.gin",
        {
            "prompt tuning": [*PAPER_RUN, CLASS_LABELS],
            "model tuning": ["runs/model_finetune.gin", "EVAL_PERIOD=1000"],
            "prompt design": [
                "runs/baseline.gin", "METHOD=priming", "BINARY=baseline", "EVAL_MODE=generate"
            ],
        },
    ),
    "figure3a": Experiment(
        "Prompt length", SWEEP, f"{_ABLATION}; lengths 1, 5, 20, 100, 150",
        "sweeps/prompt_length.gin", _TUNED,
    ),
    "figure3b": Experiment(
        "Prompt initialisation", SWEEP, f"{_ABLATION}; random, sampled vocabulary, class labels",
        "sweeps/initialisation.gin", {"": PAPER_RUN},
    ),
    "figure3c": Experiment(
        "Pre-training method", SWEEP, f"{_ABLATION}; span corruption, with sentinel, LM adaptation",
        "sweeps/pretraining_method.gin", _TUNED,
        {"as it is": [], "as it is + sentinel": ["TARGET_SENTINEL=True"]},
    ),
    "figure3d": Experiment(
        "Steps of LM adaptation", SWEEP, f"{_ABLATION}; up to 100,000 steps of adaptation",
        "sweeps/lm_adaptation_steps.gin", _TUNED, {"as it is": []},
    ),
    "figure4": Experiment(
        "Parameters per task", COUNTS, "counts of T5 1.1 by size and prompt length (and table 4)"
    ),
    "table1": Experiment(
        "Domain transfer of question answering", TRANSFER,
        "SQuAD to MRQA's six out-of-domain sets, three seeds", "runs/transfer.gin",
    ),
    "table2": Experiment(
        "Domain transfer of paraphrase detection", TRANSFER, "MRPC to QQP and back, three seeds",
        "runs/transfer_paraphrase.gin",
    ),
    "table3": Experiment(
        "Prompt ensembling", ENSEMBLE, "T5 1.1 XXL, eight SuperGLUE tasks, five prompts each"
    ),
    "section7": Experiment(
        "Interpretation: nearest tokens of tuned prompts", PORTRAIT,
        "nearest tokens by cosine of prompts from three initialisations",
        "sweeps/initialisation.gin", {"": PAPER_RUN},
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line names. `data`: whether it names a folder of data."""

    backbones: Sequence[str] = ("embedded",)
    output_dir: pathlib.Path = pathlib.Path("softprompt_reproduce")
    family: str | None = None
    vocabulary_file: str | None = None
    data: bool = False
    reduced: bool = False
    bindings: Sequence[tuple[str, str]] = ()

    @property
    def small(self) -> bool:
        """Whether the reduced form runs: the embedded backbone has no other."""
        return self.reduced or "embedded" in self.backbones


@dataclasses.dataclass(frozen=True)
class Plan:
    """What would run.

    Attributes:
      folder: where everything goes.
      files, bindings: of gin, for every run.
      runs: one line each.
      reduced: how the runs fall short of the paper's.
      missing: what cannot be run, and why.
      groups: what is still to train, for `needs`.
      done: of each result, whether it is there.
      folders: of a sweep's runs.
      tasks: of an ensemble, with bindings of its own.
    """

    name: str
    folder: pathlib.Path
    files: Sequence[str] = ()
    bindings: Sequence[tuple[str, str]] = ()
    runs: Sequence[str] = ()
    reduced: Sequence[str] = ()
    missing: Sequence[str] = ()
    groups: Sequence[needs.Group] = ()
    done: Sequence[bool] = ()
    folders: Sequence[pathlib.Path] = ()
    tasks: Mapping[str, Bindings] = dataclasses.field(default_factory=dict)

    @property
    def experiment(self) -> Experiment:
        return EXPERIMENTS[self.name]


def listing() -> list[str]:
    """A line per name."""
    return [f"{name:9} {e.title} (the paper: {e.paper})" for name, e in EXPERIMENTS.items()]


def plan(name: str, options: Options) -> Plan:
    """What `name` would run with these options.

    Raises:
      ValueError: an unknown name, a backbone that is not there, no data for the full form, or
        results of a sweep or transfer that were made by other settings.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"NAME is {name!r}, expected one of {', '.join(EXPERIMENTS)}")
    experiment = EXPERIMENTS[name]
    folder = options.output_dir / (f"{name}-reduced" if options.small else name)
    if experiment.kind == COUNTS:
        if options.bindings:
            raise ValueError(f"--gin.{options.bindings[0][0]}: {name} has no run to set it for")
        return Plan(name, options.output_dir / name, runs=["counts from shapes; nothing trains"])
    if len(options.backbones) > 1 and name != "figure1":
        raise ValueError(f"{name} takes one --backbone, got {', '.join(options.backbones)}")
    for backbone in options.backbones:
        formats.open_stored(backbone, options.vocabulary_file)
    if options.family and not pathlib.Path(options.family).is_dir():
        raise ValueError(
            f"--family {options.family!r} is not a folder; benchmarks/family.sh makes it"
        )
    planner = {SWEEP: _sweep, PORTRAIT: _sweep, TRANSFER: _transfer, ENSEMBLE: _ensemble}
    return planner[experiment.kind](Plan(name, folder), options)


def _model(options: Options) -> tuple[list[str], Bindings]:
    """The model's gin file, and what every run takes."""
    lengths = FULL_LENGTHS
    if options.small:
        lengths = REDUCED_LENGTHS if options.data else EMBEDDED_LENGTHS
    given = [("TASK_FEATURE_LENGTHS", repr(lengths))]
    if options.vocabulary_file:
        given.append(("VOCABULARY_FILE", repr(options.vocabulary_file)))
    if options.small:
        given += [("TRAIN_STEPS", str(REDUCED_STEPS))]
    if options.backbones[0] == "embedded":
        return ["models/t5_1_1_embedded.gin"], given
    given += [("ARCHITECTURE", "None"), ("INITIAL_CHECKPOINT_PATH", repr(options.backbones[0]))]
    return ["models/t5_1_1_base.gin"], given


def _at_hand(tasks: Sequence[str], splits: Sequence[str]) -> tuple[list[str], list[str]]:
    """The tasks whose splits are all there, and for each of the others why it is not."""
    found, missing = [], []
    for task in tasks:
        try:
            for split in splits:
                sources.check_at_hand(task, split)
        except ValueError as error:
            missing.append(f"{task}: {error}")
        else:
            found.append(task)
    return found, missing


def _classification(options: Options) -> tuple[list[str], list[str]]:
    """Tasks for sweeps and ensembles, and what is missing; embedded ones in the reduced form."""
    if options.small and not options.data:
        return [], ["SuperGLUE: no data named (--data_dir); embedded tasks run in its place"]
    wanted = REDUCED_TASKS if options.small else SUPER_GLUE
    found, missing = _at_hand(wanted, ("train", "validation"))
    if not found and not options.small:
        raise ValueError(f"no task of SuperGLUE is at hand; {missing[0]}")
    return found, missing


ONE_SEED = "one seed in place of three"
RANKED = "the loss among the labels, and ranked labels in place of generated ones"


def _reductions(options: Options, *more: str) -> list[str]:
    if not options.small:
        return []
    given = dict(options.bindings)
    return [
        f"{given.get('TRAIN_STEPS', REDUCED_STEPS)} steps in place of 30,000, prompts of "
        f"{given.get('PROMPT_LENGTH', 20)} vectors in place of 100 unless a run says otherwise",
        *(text for text in more if text != ONE_SEED or "SEEDS" not in given),
    ]


def _sweep(planned: Plan, options: Options) -> Plan:
    experiment = planned.experiment
    model, given = _model(options)
    files = [*model, experiment.file]
    own: Bindings = [("SWEEP_DIR", repr(str(planned.folder)))]
    over_family = planned.name == "figure1" or bool(experiment.alone)
    if over_family:
        own.append(("FAMILY", repr(options.family or "")))
    config.parse(files, own, complete=False)
    spec = sweep.read(config.macros())
    points, missing = dict(spec.points), []
    if over_family:
        points, missing = _points(spec, options, experiment)
    lines = dict(experiment.lines)
    if options.small:
        strip = lambda s: [x for x in s if not x.startswith("TRAIN_STEPS=")]  # noqa: E731
        lines = {name: strip(settings) for name, settings in spec.lines.items()}
        own.append(("SEEDS", "[0]"))
    found, without = _classification(options)
    tasks: dict[str, list[str]] = {name: [] for name in found} or dict(spec.tasks)
    if planned.experiment.kind == PORTRAIT:
        tasks = dict(list(tasks.items())[:1])
        own.append(("SEEDS", "[0]"))
    if experiment.file == "sweeps/initialisation.gin":
        for task in FREE_TEXT.keys() & tasks.keys():
            del tasks[task]
            without.append(f"{task}: it has no labels for a prompt to start from")
    else:
        for task in FREE_TEXT.keys() & tasks.keys():
            tasks[task] = [CLASS_LABELS, f"CLASS_LABELS={FREE_TEXT[task]!r}"]
    own += [("POINTS", repr(points)), ("LINES", repr(lines)), ("TASKS", repr(tasks))]
    bindings = [*given, *own, *options.bindings]
    config.parse(files, (), complete=False)
    config.parse(files, planning.known(bindings))
    spec = sweep.read(config.macros())
    runs = list(sweep.runs(spec))
    done: list[bool] = []
    known: set[str] = set()
    left: dict[str, list[planning.Run]] = {}
    for run in runs:
        binary = planning.configure(run, files, bindings, [])
        known |= set(config.macros())
        done.append(planning.finished(run) is not None)
        if binary == "train" and not done[-1]:
            left.setdefault(run.line or "prompt tuning", []).append(run)
    groups = [_group(line, alike, files, bindings) for line, alike in left.items()]
    planning.check_known(options.bindings, known)
    planning.check_free(options.bindings, LINES=spec.lines, POINTS=spec.points)
    return dataclasses.replace(
        planned, files=files, bindings=bindings, runs=[str(run) for run in runs],
        reduced=_reductions(
            options, ONE_SEED, RANKED, f"tasks: {len(spec.tasks)}, the paper has eight"
        ),
        missing=[*missing, *without], groups=groups, done=done,
        folders=[run.folder for run in runs],
    )  # fmt: skip


def _group(name: str, runs: Sequence[planning.Run], files, bindings) -> needs.Group:
    """Runs alike but for their point, task and seed; the last is taken for the largest."""

    def configure(folder: str) -> None:
        last = dataclasses.replace(runs[-1], folder=pathlib.Path(folder))
        planning.configure(last, files, bindings, [])

    return needs.Group(name, len(runs), configure)


def _points(
    spec: sweep.Spec, options: Options, experiment: Experiment
) -> tuple[dict[str, Sequence[str]], list[str]]:
    """The points whose backbones are there, and what is missing of the others."""
    if not options.family:
        missing = f"the points {', '.join(spec.points)} ({spec.axis}) of the family of backbones "
        missing += "that benchmarks/family.sh makes and --family names"
        if experiment.alone:
            return dict(experiment.alone), [missing]
        points = {}
        for backbone in options.backbones:
            millions = compare.parameters(
                formats.open_stored(backbone, options.vocabulary_file).cfg
            )
            name = f"{millions / 1e6:.2g}"
            if name in points:  # Of one size.
                name = f"{name} ({backbone})"
            points[name] = [f"INITIAL_CHECKPOINT_PATH={backbone}", "ARCHITECTURE=None"]
        return points, [missing]
    points, missing = {}, []
    for name, settings in spec.points.items():
        [path] = [s.split("=", 1)[1] for s in settings if s.startswith("INITIAL_CHECKPOINT_PATH=")]
        if pathlib.Path(path).is_dir():
            points[name] = settings
        else:
            missing.append(f"{name} ({spec.axis}): there is no backbone {path}")
    if not points:
        raise ValueError(f"the family {options.family!r} has none of the backbones; {missing[0]}")
    return points, missing


def _transfer(planned: Plan, options: Options) -> Plan:
    model, given = _model(options)
    files = [*model, planned.experiment.file]
    own: Bindings = [("TRANSFER_DIR", repr(str(planned.folder)))]
    paraphrase = planned.name == "table2"
    wanted = ["glue_mrpc", "glue_qqp"] if paraphrase else ["squad"]
    missing, reduced, origins = [], [], []
    if options.data or not options.small:
        origins, missing = _at_hand(wanted, ("train", "validation"))
        if len(origins) < len(wanted) and not options.small:
            raise ValueError(f"{planned.name} needs {' and '.join(wanted)}; {missing[0]}")
    if len(origins) == len(wanted):
        targets = list(origins)
        if not paraphrase:
            others, without = _at_hand(MRQA, ("validation",))
            more, _ = _at_hand(MRQA_MORE, ("validation",))
            targets, missing = [*targets, *others, *more], [*missing, *without]
    else:
        if not options.data:
            missing.append(f"{' and '.join(wanted)}: no data named (--data_dir)")
        part = "question_type" if paraphrase else "sentiment"
        short, long = standins.by_length(part, planned.folder / "data")
        origins, targets = [short, long] if paraphrase else [short], [short, long]
        reduced.append(
            f"a stand-in for the shift of domain: the shorter and the longer half of the embedded "
            f"{part} data; its figures say nothing of the paper's"
        )
    ranked = options.small and (paraphrase or bool(reduced))
    if ranked:
        own += [("LOSS", "labels"), ("EVAL_MODE", "rank")]
    if options.small:
        own += [("SEEDS", "[0]"), ("PROMPT_LENGTH", "20")]
    else:
        own.append(("EVAL_PERIOD", "1000"))
        if not paraphrase:
            own.append(("BEST_METRIC", "f1"))
    own += [("SOURCES", repr(origins)), ("TARGETS", repr(targets))]
    bindings = [*given, *own, *options.bindings]
    config.parse(files, bindings, complete=False)
    spec = transfer.read(config.macros())
    transfer.check_tasks(spec, config.macros()["MIXTURE_OR_TASK_MODULE"])
    runs = list(transfer.runs(spec))
    left: dict[str, list[planning.Run]] = {}
    done: list[bool] = []
    for run in runs:
        planning.configure(run, files, bindings, [])
        trained, macros = planning.finished(run), config.macros()
        if trained is None:
            left.setdefault(run.line, []).append(run)
        for target in spec.targets:
            judged = trained is not None and trained.diverged  # There is nothing to evaluate.
            if trained is not None and not judged:
                evaluation = transfer.evaluation_of(run, target, spec.split, macros)
                judged = planning.finished(evaluation) is not None
            done.append(judged)
    groups = [_group(method, alike, files, bindings) for method, alike in left.items()]
    return dataclasses.replace(
        planned, files=files, bindings=bindings,
        runs=[f"{run}; evaluated on {', '.join(spec.targets)}" for run in runs],
        reduced=_reductions(options, ONE_SEED, *([RANKED] if ranked else []), *reduced),
        missing=missing, groups=groups, done=done,
    )  # fmt: skip


def _ensemble(planned: Plan, options: Options) -> Plan:
    model, given = _model(options)
    files = [*model, "runs/population.gin"]
    if not options.small:
        files.append("runs/prompt_finetune.gin")
        given.append(("EVAL_PERIOD", "1000"))
    files.append(CLASS_LABELS)
    given.append(("SEEDS", repr(list(range(PROMPTS)))))
    found, missing = _classification(options)
    if not found:
        found = [f"embedded_{name}" for name in standins.NAMES]
    tasks = {}
    for task in found:
        own = [("MIXTURE_OR_TASK_NAME", repr(task))]
        own.append(("POPULATION_DIR", repr(str(planned.folder / task / "prompts"))))
        if task in FREE_TEXT:
            own.append(("CLASS_LABELS", repr(FREE_TEXT[task])))
        tasks[task] = own
    bindings = [*given, *options.bindings]

    def configure(folder: str) -> None:
        one = [*bindings, *tasks[found[0]], ("MODEL_DIR", repr(folder))]
        config.parse(files, one)

    configure(str(planned.folder))
    settings = members.plan(config.macros())
    if any(members.TASK in own for own in settings):
        raise ValueError(
            f"{planned.name} tunes prompts for each of its tasks, expected TASKS None and MEMBERS "
            f"without {members.TASK}"
        )
    count = len(settings)
    if count < 2:
        seeds = config.macros()["SEEDS"]
        raise ValueError(f"{planned.name}: SEEDS is {seeds!r}, expected two or more: prompts vote")
    done = [
        ensembles.is_voted(
            *ensembles.vote_of(files, [*bindings, *own], planned.folder / name, name)
        )
        for name, own in tasks.items()
    ]
    left = len(found) - sum(done)
    return dataclasses.replace(
        planned, files=files, bindings=bindings, tasks=tasks,
        runs=[f"{task}: {count} prompts at once, and their vote" for task in found],
        reduced=_reductions(options, RANKED, f"tasks: {len(found)}, the paper has eight"),
        missing=missing,
        groups=[needs.Group("prompts", left * count, configure, count)] if left else [],
        done=done,
    )  # fmt: skip
