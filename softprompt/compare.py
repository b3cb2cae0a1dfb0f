"""Measured figures beside the paper's: read from what runs leave, counted, and set in one table."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from softprompt import backbone as backbones
from softprompt import checkpoint, provenance, published, sweep, t5_config, tree
from softprompt.published import Figure

Key = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Measured:
    """A figure of ours: a mean over `seeds`, its sample deviation (None for one seed)."""

    value: float
    deviation: float | None = None
    seeds: int | None = None


def of_summary(folder: pathlib.Path, columns: Sequence[str]) -> dict[Key, Measured]:
    """What the `summary.csv` of a sweep or a transfer holds, by the values of `columns`."""
    return {
        tuple(row[c] for c in columns): Measured(
            float(row["mean"]),
            float(row["standard_deviation"]) if int(row["seeds"]) > 1 else None,
            int(row["seeds"]),
        )
        for row in checkpoint.read_table(folder / "summary.csv")
    }


def of_ensembles(folder: pathlib.Path, tasks: Sequence[str]) -> dict[Key, Measured]:
    """Average, best and ensemble of every figure of every task, and all of SuperGLUE's means.

    Those means, only where all eight tasks ran, take a task by the mean of its figures, as the
    benchmark does.
    """
    found: dict[Key, Measured] = {}
    means: dict[str, dict[str, float]] = {}
    for task in tasks:
        report = checkpoint.read_object(folder / task / "ensemble" / f"{task}.json")
        columns = {
            "average": report["average"],
            "best": report["prompts"][report["best"]],
            "ensemble": report["ensemble"],
        }
        for column, figures in columns.items():
            scores = {name: value for name, value in figures.items() if name != "illegal"}
            means.setdefault(column, {})[task] = float(np.mean(list(scores.values())))
            for name, value in scores.items():
                found[task, name, column] = Measured(value)
    wanted = {figure.key[0] for figure in published.TABLE3} - {published.SUPER_GLUE}
    if wanted <= set(tasks):
        for column, scores in means.items():
            mean = float(np.mean([scores[task] for task in sorted(wanted)]))
            found[published.SUPER_GLUE, "mean", column] = Measured(mean)
    return found


# --- counts -------------------------------------------------------------------------------------


@functools.cache
def parameters(cfg: t5_config.T5Config) -> int:
    """How many parameters a T5 has, counted over its shapes."""
    return tree.count(tree.flatten(backbones.abstract(cfg)["params"]))


def counts() -> dict[Key, Measured]:
    """Trainable and total parameters of T5 1.1 by size and prompt length, as in table 4."""
    found = {}
    for size in published.SIZES:
        cfg = t5_config.config(f"t5_1_1_{size}")
        frozen = parameters(cfg)
        for length in published.COUNT_LENGTHS:
            prompt = length * cfg.emb_dim
            found[size, str(length), published.TRAINABLE] = Measured(prompt)
            found[size, str(length), published.TOTAL] = Measured(frozen + prompt)
    return found


def per_task(cfg: t5_config.T5Config, length: int) -> dict[str, int]:
    """Task-specific parameters of each way to adapt a T5, by a prompt or prefix of `length`.

    Prefix tuning (Li and Liang 2021) counts as keys and values of `length` positions in every self-
    attention of encoder and decoder, without the network it is trained behind. WARP needs a masked
    language model and is not counted.
    """
    prefix = 2 * cfg.num_heads * cfg.head_dim * (cfg.num_encoder_layers + cfg.num_decoder_layers)
    return {
        "model tuning": parameters(cfg),
        "prefix tuning": length * prefix,
        "per-layer prompts (PROMPT_DEPTH='all')": length * cfg.emb_dim * cfg.num_encoder_layers,
        "prompt tuning": length * cfg.emb_dim,
    }


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{100 * share:.2g}%"


def methods() -> list[str]:
    """Figure 4 as a Markdown table: parameters per task, and their share of the model's."""
    lines = ["| method | length | " + " | ".join(published.SIZES) + " |"]
    lines.append("| " + " | ".join(["---"] * (len(published.SIZES) + 2)) + " |")
    cfgs = [t5_config.config(f"t5_1_1_{size}") for size in published.SIZES]
    totals = [parameters(cfg) for cfg in cfgs]
    for length in (1, 100):
        columns = [per_task(cfg, length) for cfg in cfgs]
        for method in columns[0]:
            if method == "model tuning" and length > 1:
                continue
            cells = [
                f"{found[method]:,} ({_percent(found[method] / total)})"
                for found, total in zip(columns, totals, strict=True)
            ]
            shown = "" if method == "model tuning" else str(length)
            lines.append(f"| {method} | {shown} | " + " | ".join(cells) + " |")
    lines.append(
        f"| prompt design | 500-2,000 | {' | '.join(['500-2,000 token ids'] * len(cfgs))} |"
    )
    return lines


# --- the table ----------------------------------------------------------------------------------


def rows(
    printed: Sequence[Figure], measured: Mapping[Key, Measured]
) -> list[tuple[Key, Figure | None, Measured | None]]:
    """The paper's figures in its order, each with ours or None; then those of ours it has not."""
    found: list[tuple[Key, Figure | None, Measured | None]] = [
        (figure.key, figure, measured.get(figure.key)) for figure in printed
    ]
    known = {figure.key for figure in printed}
    return [*found, *((key, None, value) for key, value in measured.items() if key not in known)]


def _shown(value: float, deviation: float | None) -> str:
    text = f"{value:,.1f}" if value < 1000 and value != int(value) else f"{value:,.10g}"
    if value < 1000 and value == int(value):
        text = f"{value:.1f}"
    return text if deviation is None else f"{text} ± {deviation:.1f}"


def table(
    printed: Sequence[Figure], measured: Mapping[Key, Measured], whole: bool = False
) -> list[str]:
    """A Markdown table of what, the paper, where it says so, here; of counts if `whole`."""

    def cell(x: Figure | Measured | None, absent: str) -> str:
        if x is None:
            return absent
        return f"{x.value:,.0f}" if whole else _shown(x.value, x.deviation)

    lines = ["| | paper | source | here |", "| --- | --- | --- | --- |"]
    for key, figure, ours in rows(printed, measured):
        source = "" if figure is None else figure.source
        if figure is not None and figure.note:
            source += f" ({figure.note})"
        what = ", ".join(part for part in key if part)
        lines.append(f"| {what} | {cell(figure, '-')} | {source} | {cell(ours, 'not run')} |")
    return lines


def write(
    name: str,
    folder: pathlib.Path,
    about: Mapping[str, Any],
    measured: Mapping[Key, Measured],
    more: Sequence[str] = (),
) -> str:
    """Writes `reproduce.csv` and `reproduce.md` to `folder`; returns the latter's text.

    Args:
      about: 'title', 'backbone', 'form', 'reduced', 'given' and 'missing' as `reproduce` has them.
      more: further lines of text.
    """
    printed = published.FIGURES.get(name, ())
    records = []
    for key, figure, ours in rows(printed, measured):
        paper = ("", "", "") if figure is None else (figure.value, figure.deviation, figure.source)
        here = ("", "", "") if ours is None else (ours.value, ours.deviation, ours.seeds)
        records.append([" / ".join(key), *("" if x is None else x for x in (*paper, *here))])
    header = ("what", "paper", "paper_deviation", "source", "here", "here_deviation", "seeds")
    checkpoint.write_atomically(folder / "reproduce.csv", sweep.as_csv(header, records))
    lines = [
        f"# {about['title']}",
        "",
        f"Backbone: {about['backbone']}. Form: {about['form']}.",
        "",
    ]
    lines += [f"- reduced: {text}" for text in about["reduced"]]
    lines += [f"- given: {text}" for text in about.get("given", ())]
    lines += [f"- not run: {text}" for text in about["missing"]]
    if lines[-1]:
        lines.append("")
    lines += [*table(printed, measured, name == "figure4"), ""]
    for statement, where in published.FINDINGS.get(name, ()):
        lines.append(f"The paper: {statement} ({published.PAPER}, {where}).")
    if not printed:
        lines.append("The paper prints no numbers for this picture, so the column is empty.")
    if more:
        lines += ["", *more]
    versions = ", ".join(f"{k} {v}" for k, v in provenance.versions().items())
    lines += ["", f"Versions: {versions}"]
    text = "\n".join(lines) + "\n"
    checkpoint.write_atomically(folder / "reproduce.md", text.encode())
    return f"{text}{folder / 'reproduce.md'} and {folder / 'reproduce.csv'} written"
