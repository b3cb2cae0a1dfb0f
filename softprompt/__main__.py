"""Command line: softprompt train, eval, infer, baseline, sweep, reproduce, and tools."""

import argparse
import functools
import os
import pathlib
import re
import signal
import sys
from collections.abc import Sequence

from softprompt import heap, mistakes

GIN_COMMANDS = ("train", "population", "eval", "infer", "baseline", "sweep", "transfer")
TRAINING = ("train", "population", "sweep", "transfer", "reproduce", "quickstart")
# Settings that say where files lie, which may be each host's own affair; their content is not.
PLACE = re.compile(r"(^|[._])(dir|path|files?|corpus|trial_prompt)$", re.IGNORECASE)
# Commands that several processes can run together, and how they find each other.
JOB_COMMANDS = ("train", "eval")
JOB_FLAGS = ("coordinator_address", "num_processes", "process_id", "distributed")
# As a shell tells that SIGTERM ended a command, so that what comes after it does not run.
STOPPED = 128 + signal.SIGTERM
# What a run must be given, but the memory it needs does not depend on.
NOT_FOR_DRY_RUNS = ("MODEL_DIR", "MIXTURE_OR_TASK_NAME", "INITIAL_CHECKPOINT_PATH", "CORPUS",
                    "VOCABULARY_FILE")  # fmt: skip


def _quiet() -> None:
    """Keeps TensorFlow's and XLA's start-up chatter off the terminal; errors still show."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    import logging
    import warnings

    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)


def _use_compilation_cache() -> None:
    """Compiled programs are kept between runs."""
    import jax

    from softprompt import checkpoint

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(checkpoint.cache_folder() / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _split_cpu(count: int | None) -> None:
    """Makes the CPU so many devices, before JAX has made one of it."""
    if count is None:
        return
    import jax

    if count < 1:
        raise ValueError(f"--cpu_devices is {count}, expected at least 1")
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        raise ValueError(f"--cpu_devices={count} comes too late: {error}") from None


EPILOG = """Shipped gin files, and what each needs: README.md. --gin.NAME=VALUE sets a name of
theirs, such as --gin.BATCH_SIZE=16."""


def parser() -> argparse.ArgumentParser:
    """The command line's grammar; `--gin.NAME=VALUE` is read apart from it."""
    top = argparse.ArgumentParser(
        prog="softprompt", description="Soft prompts for frozen T5 language models."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in (
        ("train", "tune a prompt (or whatever TRAINABLE names) on a task"),
        ("population", "tune many prompts in one run: seeds, rates, lengths, tasks"),
        ("eval", "evaluate a prompt, or an ensemble of prompts, on a task"),
        ("infer", "predict for the rows of a file"),
        ("baseline", "evaluate what prompt tuning is held against: majority, priming, a probe"),
        ("sweep", "train over points, tasks and seeds: gin/sweeps holds the paper's ablations"),
        ("transfer", "train on one task, evaluate on others: prompt tuning beside model tuning"),
    ):
        command = commands.add_parser(name, help=what, epilog=EPILOG)
        of_gin = command.add_argument_group("what to run")
        of_gin.add_argument(
            "--gin_file", action="append", default=[], metavar="FILE",
            help="a path, or a shipped file such as models/t5_1_1_embedded.gin; may be repeated",
        )  # fmt: skip
        of_gin.add_argument(
            "--gin_search_paths", default="", metavar="DIR[,DIR…]",
            help="where gin files are looked for after the working directory",
        )  # fmt: skip
        of_gin.add_argument(
            "--gin_bindings", action="append", default=[], metavar="NAME=VALUE",
            help="the same as --gin.NAME=VALUE, as T5X spells it",
        )  # fmt: skip
        if name != "baseline":
            of_gin.add_argument(
                "--ignore_fingerprint", action="store_true",
                help="take prompts that were tuned for another backbone of the same width; a "
                "training reads some with prompts/from_file.gin or prompts/from_most_similar.gin",
            )  # fmt: skip
        if name != "infer":
            known = command.add_argument_group("data that the tasks read")
            known.add_argument("--data_dir", metavar="DIR", help="JSON Lines: DIR/glue/rte/…")
            known.add_argument("--tfds_data_dir", metavar="DIR", help="TensorFlow data sets")
            known.add_argument(
                "--seqio_additional_cache_dirs", default="", metavar="DIR[,DIR…]",
                help="caches that seqio_cache_tasks made",
            )  # fmt: skip
        own = command.add_argument_group("your own data")
        if name != "infer":
            own.add_argument("--task_name", default="user_task", help="what to call them")
            kinds = "JSON Lines, CSV or TSV, perhaps .gz"
            for split in ("train", "validation", "test"):
                own.add_argument(f"--{split}_file", metavar="FILE", help=kinds)
            own.add_argument("--target", help="field that holds the label or target text")
        own.add_argument("--template", help='text of a row, such as "review: {text}"')
        own.add_argument("--labels", help="label names, separated by commas")
        devices = command.add_argument_group("devices and processes")
        devices.add_argument(
            "--cpu_devices", type=int, metavar="N",
            help="make the CPU N devices (as many as cores, say), each with its share of a batch",
        )  # fmt: skip
        if name in JOB_COMMANDS:
            devices.add_argument(
                "--coordinator_address", metavar="HOST:PORT", help="of process 0 of a job"
            )
            devices.add_argument("--num_processes", type=int, help="processes of the job")
            devices.add_argument("--process_id", type=int, help="which of them this is, from 0")
            devices.add_argument(
                "--distributed", choices=("auto",),
                help="take them from the cluster: SLURM, TPU pods, Kubernetes, Open MPI",
            )  # fmt: skip
        if name == "train":
            dry = command.add_argument_group("memory")
            dry.add_argument(
                "--dry_run", action="store_true",
                help="print what memory the run needs per device, and what fits; load nothing",
            )  # fmt: skip
            dry.add_argument(
                "--device_memory", help="of each device, such as 80GiB (default: as it says itself)"
            )
            dry.add_argument(
                "--topology", metavar="NAME",
                help="dry run for devices that are not here, such as v5e:2x4 or h100:8",
            )  # fmt: skip
    quick = commands.add_parser("quickstart", help="tune a prompt on the embedded default")
    quick.add_argument("--output_dir", default="softprompt_quickstart")
    quick.add_argument("--task", default=None, help="one of the embedded data sets")
    quick.add_argument("--steps", type=int, default=None)
    quick.add_argument("--seed", type=int, default=0)
    words = commands.add_parser("vocabulary", help="train a SentencePiece vocabulary on text")
    words.add_argument("inputs", nargs="+", help="JSON Lines files with a field 'text'")
    words.add_argument("--output", required=True)
    words.add_argument("--size", type=int, default=8000)
    words.add_argument("--sentences", type=int, default=250_000)
    table = commands.add_parser("embeddings", help="token embeddings from co-occurrence counts")
    table.add_argument("inputs", nargs="+", help="JSON Lines files with a field 'text'")
    table.add_argument("--vocabulary_file", required=True)
    table.add_argument("--output", required=True, help="a .npy file")
    table.add_argument("--width", type=int, required=True, help="H of the model to start")
    table.add_argument("--window", type=int, default=8, help="largest distance that counts")
    table.add_argument("--seed", type=int, default=0)
    inspect = commands.add_parser("inspect", help="print what a prompt or backbone says of itself")
    inspect.add_argument("path", help="a prompt or a backbone in any format, or 'embedded'")
    inspect.add_argument("--backbone", help="show a prompt's nearest tokens in this backbone")
    inspect.add_argument("--neighbours", type=int, default=5, help="tokens per vector")
    analyse = commands.add_parser(
        "analyse",
        aliases=["analyze"],
        help="nearest tokens, clusters, drift, similarity of prompts",
    )
    analyse.add_argument("paths", nargs="+", metavar="PROMPT", help="prompts, or folders of runs")
    analyse.add_argument("--backbone", help="look for nearest tokens in this backbone")
    analyse.add_argument("--output_dir", default="softprompt_analysis")
    analyse.add_argument("--neighbours", type=int, default=5, help="tokens per vector")
    analyse.add_argument("--metric", choices=("cosine", "euclidean"), default="cosine")
    analyse.add_argument("--labels", help="class labels to look for, separated by commas")
    analyse.add_argument("--initial", metavar="PROMPT", help="what drift is measured from")
    report = commands.add_parser(
        "report", help="write report.html for the folder of a run or sweep"
    )
    report.add_argument("folder", metavar="FOLDER")
    report.add_argument("--backbone", help="look for the prompt's nearest tokens in this backbone")
    convert = commands.add_parser("convert", help="write a backbone or prompt in another format")
    convert.add_argument("source", help="a path, a gs:// URL, or a Hugging Face hub name")
    convert.add_argument("output", help="where to write; must not exist")
    convert.add_argument(
        "--to", required=True, choices=("softprompt", "hf", "t5x", "prompt", "npy", "peft"),
        help="the first three for a backbone, the others for a prompt",
    )  # fmt: skip
    convert.add_argument("--dtype", choices=("float32", "bfloat16", "int8"), help="of the weights")
    convert.add_argument("--backbone", help="of a prompt: its name and fingerprint are recorded")
    paper = commands.add_parser(
        "reproduce", help="rerun a table or figure of the paper, beside its printed figures",
        epilog="--gin.NAME=VALUE overrides a gin macro of every run.",
    )  # fmt: skip
    paper.add_argument("name", nargs="?", metavar="NAME", help="table1, figure3a, …; see --list")
    paper.add_argument(
        "--backbone", default="embedded", help="figure1 takes several, separated by commas"
    )
    paper.add_argument("--family", help="the folder that benchmarks/family.sh wrote")
    paper.add_argument("--data_dir", help="folder of JSON Lines data sets")
    paper.add_argument("--tfds_data_dir", help="folder of TensorFlow data sets")
    paper.add_argument("--output_dir", help="default: softprompt_reproduce")
    paper.add_argument("--list", action="store_true", help="print the names, run nothing")
    paper.add_argument(
        "--plan",
        action="store_true",
        help="print what would run and, by a few measured steps, what it needs; run no more",
    )
    paper.add_argument(
        "--reduced", action="store_true",
        help="fewer steps, seeds and tasks; always so with the embedded backbone",
    )  # fmt: skip
    for command in (inspect, analyse, report, convert, paper):
        command.add_argument(
            "--vocabulary_file", help="a SentencePiece model or 'bytes', where the source has none"
        )
    convert.add_argument(
        "--relative_max_distance", type=int, help="of a T5X checkpoint that differs from T5's 128"
    )
    return top


def split_gin(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Separates `--gin.NAME=VALUE` (or `--gin.NAME VALUE`) from the other arguments."""
    rest, bindings = [], []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith("--gin."):
            rest.append(argument)
            continue
        name, equals, value = argument.removeprefix("--gin.").partition("=")
        if not equals:
            if not remaining:
                raise ValueError(f"{argument} has no value; write {argument}=VALUE")
            value = remaining.pop(0)
        bindings.append((name, value))
    return rest, bindings


def _dry_run(args: argparse.Namespace, bindings: list[tuple[str, str]]) -> int:
    """Prints what the run that these arguments describe needs; of data it reads nothing."""
    from softprompt import config, dry_run, launch, train_settings

    search_paths = [p for p in args.gin_search_paths.split(",") if p]
    config.parse(args.gin_file, bindings, search_paths, optional=NOT_FOR_DRY_RUNS)
    settings = config.arguments(launch.train)
    folder = settings["model_dir"] or ""  # Nothing is written there.
    train_settings.check({**settings, "model_dir": folder})
    labels = 0
    if settings["loss"] == launch.eval_task.LABELS:
        labels = launch.label_count(settings)
    with config.errors():
        for text in dry_run.texts(settings, args.device_memory, labels, args.topology):
            print(text, flush=True)
    return 0


def _run_gin(args: argparse.Namespace, bindings: list[tuple[str, str]]) -> int:
    for name in ("device_memory", "topology"):
        if getattr(args, name, None) and not args.dry_run:
            raise ValueError(f"--{name} is for --dry_run")
    if getattr(args, "dry_run", False):
        return _dry_run(args, [*_user_data(args), *bindings, *_gin_bindings(args)])
    from softprompt import config, hosts, launch

    bindings = [*_user_data(args), *bindings, *_gin_bindings(args)]
    if getattr(args, "ignore_fingerprint", False):
        bindings.append(("IGNORE_FINGERPRINT", "True"))
    search_paths = [p for p in args.gin_search_paths.split(",") if p]
    parsed = args.gin_file, bindings, search_paths
    if args.command in ("sweep", "population", "transfer"):  # Each of their runs reads gin anew.
        _use_data(args)
        from softprompt import members, sweep, transfer

        of_many = {
            "sweep": functools.partial(sweep.sweep, strict=True),
            "population": members.run,
            "transfer": transfer.transfer,
        }
        return 0 if of_many[args.command](*parsed) else STOPPED
    config.parse(*parsed)
    _use_data(args)
    settings = config.settings_in(config.operative())
    hosts.agree("settings", {k: v for k, v in settings.items() if not PLACE.search(k)})
    with config.errors():
        found = config.configured(getattr(launch, args.command))()
    return STOPPED if args.command == "train" and found.interrupted else 0


def _use_data(args: argparse.Namespace) -> None:
    """Tells what reads data of the folders that the flags name."""
    from softprompt.importing import hide_accelerators, import_seqio
    from softprompt.tasks import sources

    hide_accelerators()  # Where a gin file's import brought TensorFlow.
    if folder := getattr(args, "data_dir", None):
        sources.use_data_dir(folder)
    if folder := getattr(args, "tfds_data_dir", None):
        import_seqio().set_tfds_data_dir_override(folder)
    if cached := getattr(args, "seqio_additional_cache_dirs", ""):
        seqio, folders = import_seqio(), cached.split(",")
        from tensorflow.io import gfile

        if absent := [folder for folder in folders if not gfile.isdir(folder)]:
            raise ValueError(f"--seqio_additional_cache_dirs: there is no folder {absent[0]!r}")
        seqio.add_global_cache_dirs(folders)


def _reproduce(args: argparse.Namespace, bindings: list[tuple[str, str]]) -> int:
    _use_data(args)
    from softprompt import experiments, reproduce

    if args.list or not args.name:
        print("\n".join(experiments.listing()))
        return 0
    options = experiments.Options(
        backbones=tuple(args.backbone.split(",")),
        output_dir=pathlib.Path(args.output_dir or "softprompt_reproduce"),
        family=args.family,
        vocabulary_file=args.vocabulary_file,
        data=bool(args.data_dir or args.tfds_data_dir or os.environ.get("SOFTPROMPT_DATA_DIR")),
        reduced=args.reduced,
        bindings=tuple(bindings),
    )
    return 0 if reproduce.run(args.name, options, args.plan) else STOPPED


def _gin_bindings(args: argparse.Namespace) -> list[tuple[str, str]]:
    """What `--gin_bindings` gives, as T5X has it."""
    bindings = []
    for binding in args.gin_bindings:
        name, equals, value = binding.partition("=")
        if not equals:
            raise ValueError(f"--gin_bindings {binding!r}: expected NAME=VALUE")
        bindings.append((name.strip(), value.strip()))
    return bindings


def _listed(value: str) -> list[str]:
    """What a flag lists, with or without blanks behind its commas."""
    return [part.strip() for part in value.split(",")]


def _user_data(args: argparse.Namespace) -> list[tuple[str, str]]:
    """The flags for a user's own data, as gin bindings."""
    from softprompt.settings import USER_DATA

    bindings = []
    for flag, macro in USER_DATA.items():
        value = getattr(args, flag, None)
        if value is not None:
            bindings.append((macro, repr(_listed(value)) if flag == "labels" else repr(value)))
    if any(getattr(args, f"{split}_file", None) for split in ("train", "validation", "test")):
        bindings.append(("MIXTURE_OR_TASK_NAME", repr(args.task_name)))
        if args.command == "transfer":
            raise ValueError(
                "softprompt transfer takes no --train_file, --validation_file or --test_file: "
                "SOURCES and TARGETS are seqio tasks; register yours in MIXTURE_OR_TASK_MODULE"
            )
        # In place of those that the gin files list.
        lists = {"sweep": repr({args.task_name: []}), "population": "None"}
        if args.command in lists:
            bindings.append(("TASKS", lists[args.command]))
    return bindings


def _clear_bar() -> None:
    """Takes away a progress bar that something interrupted."""
    if "softprompt.logbook" in sys.modules:
        sys.modules["softprompt.logbook"].clear()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    A user's mistake is one sentence on standard error and 2; what SIGTERM stopped before its end
    is 143, Ctrl-C 130.
    """
    _quiet()
    try:
        rest, bindings = split_gin(sys.argv[1:] if arguments is None else arguments)
        args = parser().parse_args(rest)
        if bindings and args.command not in (*GIN_COMMANDS, "reproduce"):
            raise ValueError(f"softprompt {args.command} takes no --gin flags")
        if not getattr(args, "topology", None):  # JAX reads none of programs for other devices.
            _use_compilation_cache()
        if args.command in (*GIN_COMMANDS, *TRAINING):
            heap.keep()
        if args.command in TRAINING:
            heap.compute_within_calls()
        if args.command in GIN_COMMANDS:
            from softprompt import hosts

            _split_cpu(args.cpu_devices)
            flags = {name: getattr(args, name, None) for name in JOB_FLAGS}
            with hosts.job(agrees=True, saves=args.command in TRAINING, **flags):
                return _run_gin(args, bindings)
        if args.command == "reproduce":
            return _reproduce(args, bindings)
        if args.command == "quickstart":
            from softprompt import quickstart

            done = quickstart.run(args.output_dir, args.task, args.steps, args.seed)
            return 0 if done else STOPPED
        if args.command == "vocabulary":
            from softprompt import vocabulary

            vocabulary.train(args.inputs, args.output, args.size, args.sentences)
            print(f"{args.size} pieces in {args.output}")
            return 0
        if args.command == "embeddings":
            from softprompt import cooccurrence

            made = cooccurrence.make(
                args.inputs, args.vocabulary_file, args.output, args.width, args.window, args.seed
            )
            print(f"embeddings {made.shape} in {args.output}")
            return 0
        if args.command in ("analyse", "analyze"):
            from softprompt import portrait

            labels = _listed(args.labels) if args.labels else None
            found = portrait.run(
                args.paths, args.backbone, args.output_dir, args.vocabulary_file,
                args.neighbours, args.metric, labels, args.initial,
            )  # fmt: skip
            print("\n".join(found))
            return 0
        if args.command == "report":
            from softprompt import report

            print(f"{report.run(args.folder, args.backbone, args.vocabulary_file)} written")
            return 0
        from softprompt import convert

        options = {k: v for k, v in vars(args).items() if k != "command"}
        if args.command == "convert":
            convert.convert(**options)
        else:
            print("\n".join(convert.inspect(**options)))
        return 0
    except BaseException as error:
        told = mistakes.told(error)
        if told is None:
            raise
        sentence, code = told
        _clear_bar()
        print(f"softprompt: {sentence}", file=sys.stderr, flush=True)
        return code


def command() -> None:
    """`main` as a process, which ends at once where it failed.

    What the devices are still at would be torn down under them: a segmentation fault.
    """
    sys.path.append("")  # Modules of the working directory, which `python -m` would find too.
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)


if __name__ == "__main__":
    command()
