"""`softprompt infer`: a prediction for each row of a file, by one prompt or by the row's own.

Gin files name the function `launch.infer`.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from softprompt import backbone as backbones
from softprompt import banks, checkpoint, data, evaluation, partition, tree
from softprompt.logbook import Progress, say, track
from softprompt.settings import (
    check_kinds,
    check_labels,
    check_numbers,
    check_path,
    check_settings,
)

Path = str | os.PathLike
# Rows that are predicted before their lines are written.
CHUNK = 512


@dataclasses.dataclass(frozen=True)
class _Named:
    """The prompts of a file's rows: what each is used with, and which one is whose."""

    files: Sequence[Path | None]
    templates: Sequence[str]
    labels: Sequence[Sequence[str] | None]
    which: Sequence[int]


def _named_prompts(
    rows: Sequence[Any],
    prompts: Mapping[str, Any],
    field: str,
    default: Path | None,
    template: str,
    labels: Sequence[str] | None,
) -> _Named:
    """The prompts that rows name in `field`: names of `prompts`, or paths.

    A row without the field takes the prompt `default`.
    """
    known = {}
    for name, value in prompts.items():
        own = {"file": value} if isinstance(value, str | os.PathLike) else value
        if not isinstance(own, Mapping) or not {"file"} <= set(own) <= {
            "file", "template", "labels",
        }:  # fmt: skip
            raise ValueError(
                f"PROMPTS[{name!r}] is {value!r}, expected a path or {{'file': …, 'template': …, "
                f"'labels': […]}}"
            )
        check_path(f"the file of PROMPTS[{name!r}]", own["file"], optional=True)
        known[name] = (own["file"], own.get("template", template), own.get("labels", labels))
        _check_texts(f" of PROMPTS[{name!r}]", *known[name][1:])
    places: dict[str, int] = {}
    found, which = [], []
    for row in rows:
        name = row.get(field, default)
        if name is None:
            raise ValueError(f"{row.where}: no field {field!r} names its prompt")
        name = str(name)
        if name not in places:
            if not (name in known or "://" in name or os.path.exists(name)):
                raise ValueError(
                    f"{row.where}: {field} is {name!r}, which is neither a file nor one of PROMPTS "
                    f"({', '.join(known) or 'none given'})"
                )
            places[name] = len(found)
            found.append(known.get(name, (name, template, labels)))
        which.append(places[name])
    files, templates, sets = zip(*found, strict=True)
    return _Named(files, templates, sets, which)


def _check_texts(of: str, template: Any, labels: Any) -> None:
    """Raises unless these can be a template and labels; `of` says whose."""
    check_kinds(**{f"TEXT_TEMPLATE{of}": (template, isinstance(template, str), "a text")})
    check_labels(f"LABELS{of}", labels)


def infer(
    input_file: Path,
    output_file: Path,
    initial_checkpoint_path: str,
    prompt_file: Path | None = None,
    prompts: Mapping[str, Any] | None = None,
    prompt_field: str = "prompt",
    template: str = "{text}",
    labels: Sequence[str] | None = None,
    task_feature_lengths: Mapping[str, int] | None = None,
    batch_size: int = 32,
    beams: int = 1,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    mesh: Callable[[], jax.sharding.Mesh] = partition.make_mesh,
    dtype: str = "float32",
    vocabulary_file: str | None = None,
    ignore_fingerprint: bool = False,
    weights: str | None = None,
) -> int:
    """Predicts a text (or, with `labels`, the likeliest label) for each row of a JSONL or CSV file.

    Each output line is the row's fields and `prediction`. A run that was stopped goes on with the
    lines in `<output_file>.partial`, unless it would now predict otherwise: an error. With
    `prompts` (`{}` if there are only paths) rows of many tasks share batches: each names its prompt
    in `prompt_field`, by a path or by a name in `prompts`, whose value is a path or `{'file': …,
    'template': …, 'labels': […]}`. Returns the number of rows.
    """
    from softprompt.tasks import records

    for name, path in (("INPUT_FILE", input_file), ("OUTPUT_FILE", output_file)):
        check_path(name, path)
    check_path("PROMPT_FILE", prompt_file, optional=True)
    good = prompts is None or isinstance(prompts, Mapping)
    check_kinds(PROMPTS=(prompts, good, "{NAME: a path or {'file': …}, …} or None"))
    _check_texts("", template, labels)
    if pathlib.Path(output_file).suffix in (".gz", ".csv", ".tsv"):
        raise ValueError(
            f"OUTPUT_FILE is {str(output_file)!r}, expected a name that ends otherwise, as in "
            f".jsonl: it holds JSON Lines as they are"
        )
    if pathlib.Path(output_file).is_dir():
        raise ValueError(f"OUTPUT_FILE {str(output_file)!r} is a folder, expected a file")
    if os.path.realpath(output_file) == os.path.realpath(input_file):
        raise ValueError(f"OUTPUT_FILE {str(output_file)!r} is INPUT_FILE, expected another file")
    lengths = task_feature_lengths or {"inputs": 512, "targets": 64}
    check_settings(
        dtype, lengths, BATCH_SIZE=(batch_size, 1), BEAMS=(beams, 1), TOP_K=(top_k, 0),
        SEED=(seed, 0),
    )  # fmt: skip
    check_numbers(TEMPERATURE=(temperature, 0), TOP_P=(top_p, 0))
    rows = list(track(records.read(input_file), f"reading {input_file}", "rows"))
    if taken := [row.where for row in rows if "prediction" in row]:
        raise ValueError(
            f"{taken[0]}: the row has a field 'prediction', which the output would have twice; "
            f"give it another name"
        )
    if prompts is None:
        named = _Named([prompt_file], [template], [labels], [0] * len(rows))
    else:
        named = _named_prompts(rows, prompts, prompt_field, prompt_file, template, labels)
    if None not in named.labels and (beams > 1 or temperature):
        raise ValueError(
            f"got LABELS, which are ranked, with BEAMS {beams} and TEMPERATURE {temperature:g}, "
            f"which are for generated texts: leave them out"
        )
    texts = [
        records.fill(named.templates[k], row) for k, row in zip(named.which, rows, strict=True)
    ]
    backbone = backbones.load(
        initial_checkpoint_path,
        dtype,
        mesh=mesh(),
        vocabulary_file=vocabulary_file,
        weights=weights,
    )
    single = prompts is None
    read = banks.read(backbone, named.files, ignore_fingerprint, deep=single)
    flat, length = banks.alone(backbone, read[0]) if single else banks.together(backbone, read)
    decoding = {"beams": beams, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    predictor = evaluation.Predictor(
        backbone, length, batch_size=batch_size, decode_length=lengths["targets"], seed=seed,
        prefix=banks.target_prefix(backbone, read), evaluations=None, **decoding,
    )  # fmt: skip
    identity = {
        "backbone": backbone.fingerprint,
        "weights": backbone.weights,
        "dtype": dtype,
        "prompts": tree.fingerprint({k: x for k, x in flat.items() if k.startswith("prompt/")}),
        "inputs": hashlib.sha256(json.dumps([texts, rows, list(named.which)]).encode()).hexdigest(),
        "rows": len(texts),
        "labels": [own and list(own) for own in named.labels],
        "task_feature_lengths": dict(lengths),
        "seed": seed,
        **decoding,
    }
    partial = pathlib.Path(f"{output_file}.partial")
    with checkpoint.writing(output_file):
        partial.parent.mkdir(parents=True, exist_ok=True)
    done = _begun(partial, identity)
    with checkpoint.writing(partial):
        partial.touch()
    progress = Progress("predicting", len(rows), "rows", every=0, start=done)
    try:
        while done < len(rows):
            chunk = slice(done, done + CHUNK)
            pairs = [(text, "") for text in texts[chunk]]
            examples = data.from_pairs(pairs, backbone.vocabulary, lengths, str(input_file))
            if message := data.cut_message(examples, lengths):
                say(message)
            which = named.which[chunk]
            predictions = predictor.predict_mixed(flat, examples, which, named.labels, first=done)
            lines = [
                json.dumps({**row, "prediction": predicted}, ensure_ascii=False) + "\n"
                for row, predicted in zip(rows[chunk], predictions, strict=True)
            ]
            with checkpoint.writing(partial), open(partial, "a", encoding="utf-8") as out:
                out.write("".join(lines))
            done += len(predictions)
            progress.update(done)
    except KeyboardInterrupt:
        say(f"{done} rows are kept in {partial}; the same command goes on from here")
        raise
    os.replace(partial, output_file)
    _identity_file(partial).unlink()
    say(f"{len(rows)} predictions in {output_file}")
    return len(rows)


def _identity_file(partial: pathlib.Path) -> pathlib.Path:
    return partial.with_name(f"{partial.name}.json")


def _begun(partial: pathlib.Path, identity: Mapping[str, Any]) -> int:
    """How many rows a stopped run left in `partial`; the file of its settings is written if none.

    Raises:
      ValueError: the run had other settings, and its lines would stand beside other ones.
    """
    settings, done = _identity_file(partial), _complete_lines(partial)
    if not done:
        checkpoint.write_atomically(settings, json.dumps(identity).encode())
        return 0
    before = checkpoint.read_object(settings) if settings.exists() else {}
    if differ := checkpoint.differences(before, identity):
        raise ValueError(
            f"{str(partial)!r} holds {done} predictions of another run: {'; '.join(differ)}. "
            f"Delete it, or give the same settings to go on"
        )
    say(f"going on after {done} rows of {partial}")
    return done


def _complete_lines(path: pathlib.Path) -> int:
    """Number of whole lines of a file; a torn last line is cut off."""
    if not path.exists():
        return 0
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        checkpoint.write_atomically(path, whole)
    return whole.count(b"\n")
