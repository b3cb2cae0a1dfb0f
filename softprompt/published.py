"""The figures that Lester et al. 2021 (arXiv 2104.08691, version 2) print, each with its source.

All scores are per cent. Those of figures 1 and 3 are printed nowhere as numbers: for them there are
`FINDINGS`, the paper's own statements in short, and no value is read off a picture.
"""

import dataclasses
from collections.abc import Sequence

PAPER = "Lester et al. 2021"
SIZES = ("small", "base", "large", "xl", "xxl")


@dataclasses.dataclass(frozen=True)
class Figure:
    """A printed figure: `key` names it as our results do, the last part is the column.

    A domain transfer's key is (source, target, figure, method), an ensemble's (task, figure,
    column), a parameter count's (size, prompt length, column).
    """

    key: tuple[str, ...]
    value: float
    deviation: float | None
    source: str
    note: str = ""


def _transfer(
    rows: Sequence[tuple[str, str, str, tuple[float, float], tuple[float, float]]], source: str
) -> tuple[Figure, ...]:
    return tuple(
        Figure((*row[:3], method), *figure, source)
        for row in rows
        for method, figure in zip(("model tuning", "prompt tuning"), row[3:], strict=True)
    )


TABLE1 = _transfer(
    [
        ("squad", target, "f1", model, prompt)
        for target, model, prompt in (
            ("squad", (94.9, 0.2), (94.8, 0.1)),
            ("mrqa_textbookqa", (54.3, 3.7), (66.8, 2.9)),
            ("mrqa_bioasq", (77.9, 0.4), (79.1, 0.3)),
            ("mrqa_race", (59.8, 0.6), (60.7, 0.5)),
            ("mrqa_relationextraction", (88.4, 0.1), (88.8, 0.2)),
            ("mrqa_duorc", (68.9, 0.7), (67.7, 1.1)),
            ("mrqa_drop", (68.9, 1.7), (67.1, 1.9)),
        )
    ],
    f"{PAPER}, table 1",
)
TABLE2 = _transfer(
    [
        ("glue_qqp", "glue_mrpc", "accuracy", (73.1, 0.9), (76.3, 0.1)),
        ("glue_qqp", "glue_mrpc", "f1", (81.2, 2.1), (84.3, 0.3)),
        ("glue_mrpc", "glue_qqp", "accuracy", (74.9, 1.3), (75.4, 0.8)),
        ("glue_mrpc", "glue_qqp", "f1", (70.9, 1.2), (69.7, 0.3)),
    ],
    f"{PAPER}, table 2",
)
ENSEMBLE = ("average", "best", "ensemble")
SUPER_GLUE = "SuperGLUE (dev)"
# Average, best and ensemble of five prompts on T5 XXL; the last row is the mean over the tasks.
TABLE3 = tuple(
    Figure((task, figure, column), value, None, f"{PAPER}, table 3")
    for task, figure, *values in (
        ("super_glue_boolq", "accuracy", 91.1, 91.3, 91.7),
        ("super_glue_cb", "accuracy", 99.3, 100.0, 100.0),
        ("super_glue_cb", "mean_3class_f1", 99.0, 100.0, 100.0),
        ("super_glue_copa", "accuracy", 98.8, 100.0, 100.0),
        ("super_glue_multirc", "exact_match", 65.7, 66.3, 67.1),
        ("super_glue_multirc", "f1", 88.7, 89.0, 89.4),
        ("super_glue_record", "em", 92.7, 92.9, 93.2),
        ("super_glue_record", "f1", 93.4, 93.5, 93.9),
        ("super_glue_rte", "accuracy", 92.6, 93.5, 93.5),
        ("super_glue_wic", "accuracy", 76.2, 76.6, 77.4),
        ("super_glue_wsc", "accuracy", 95.8, 96.2, 96.2),
        (SUPER_GLUE, "mean", 90.5, 91.0, 91.3),
    )
    for column, value in zip(ENSEMBLE, values, strict=True)
)
COUNT_LENGTHS = (1, 5, 20, 50, 100, 150)
TRAINABLE, TOTAL = "trainable", "total"
# Misprints of table 4: a prompt of 20 vectors of 512 has 10,240 numbers, and XXL with 50 vectors
# 11,135,537,152 by the table's own other rows.
_MISPRINTS = {
    ("small", "20", TRAINABLE): "as printed; 20 x 512 is 10,240",
    ("small", "20", TOTAL): "as printed; follows the misprinted 10,420",
    ("xxl", "50", TOTAL): "as printed; the other rows of XXL give 11,135,537,152",
}
_PRINTED = {
    "small": (
        (512, 2_560, 10_420, 25_600, 51_200, 76_800),
        (76_961_664, 76_963_712, 76_971_572, 76_986_752, 77_012_352, 77_037_952),
    ),
    "base": (
        (768, 3_840, 15_360, 38_400, 76_800, 115_200),
        (247_578_624, 247_581_696, 247_593_216, 247_616_256, 247_654_656, 247_693_056),
    ),
    "large": (
        (1_024, 5_120, 20_480, 51_200, 102_400, 153_600),
        (783_151_104, 783_155_200, 783_170_560, 783_201_280, 783_252_480, 783_303_680),
    ),
    "xl": (
        (2_048, 10_240, 40_960, 102_400, 204_800, 307_200),
        (2_849_759_232, 2_849_767_424, 2_849_798_144, 2_849_859_584, 2_849_961_984, 2_850_064_384),
    ),
    "xxl": (
        (4_096, 20_480, 81_920, 204_800, 409_600, 614_400),
        (11_135_336_448, 11_135_352_832, 11_135_414_272, 11_137_380_352, 11_135_741_952,
         11_135_946_752),
    ),
}  # fmt: skip
TABLE4 = tuple(
    Figure(key, value, None, f"{PAPER}, table 4", _MISPRINTS.get(key, ""))
    for size, columns in _PRINTED.items()
    for i, length in enumerate(COUNT_LENGTHS)
    for column, value in zip((TRAINABLE, TOTAL), (columns[0][i], columns[1][i]), strict=True)
    for key in [(size, str(length), column)]
)
FIGURES = {"table1": TABLE1, "table2": TABLE2, "table3": TABLE3, "figure4": TABLE4}

_XXL = (
    "by the default settings T5 XXL reaches 90.5 on SuperGLUE's development sets "
    "(the mean of five prompts)",
    "table 3",
)
# What the paper says of what it does not print as numbers: (statement, where).
FINDINGS = {
    "figure1": (
        ("prompt tuning gains on model tuning with size, and matches even the multi-task one at "
         "XXL", "section 3.1"),
        ("prompt-tuned Small matches few-shot GPT-3 XL, prompt-tuned Large beats GPT-3 175B",
         "section 3.1"),
        _XXL,
    ),
    "figure3a": (
        ("for most sizes more than one vector is needed, beyond 20 the gain is marginal; XXL is "
         "good with one", "section 3.2, figure 3a"),
        _XXL,
    ),
    "figure3b": (
        ("class labels are the best initialisation and random uniform lags; the difference is "
         "gone at XXL", "section 3.2, figure 3b"),
        _XXL,
    ),
    "figure3c": (
        ("LM adaptation beats span corruption at every size, a sentinel before the targets has "
         "little benefit; XXL is good with all", "section 3.2, figure 3c"),
        _XXL,
    ),
    "figure3d": (
        ("longer adaptation gains, up to 100,000 steps; XXL is robust to a short one",
         "section 3.2, figure 3d"),
        _XXL,
    ),
    "figure4": (
        ("prefix tuning takes 0.1-1% task-specific parameters, WARP under 0.1%, prompt tuning "
         "under 0.01% for models over a billion parameters", "section 4, figure 4"),
    ),
    "section7": (
        ("the five nearest tokens of a position form tight semantic clusters; class labels often "
         "persist from their initialisation; long prompts have several positions with the same "
         "neighbours", "section 7"),
    ),
}  # fmt: skip
