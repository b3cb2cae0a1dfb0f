"""Rows of JSON Lines, CSV and TSV files: reading, templates, labels. Without TensorFlow."""

import csv
import dataclasses
import gzip
import json
import os
import pathlib
import re
import string
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

Path = str | os.PathLike
# Characters of a field in a table; Python's own limit of 131,072 is less than a long document.
LONGEST_FIELD = 2**31 - 1


class Row(dict):
    """The fields of one row, which knows the file and line it comes from."""

    def __init__(self, fields: dict[str, Any], file: str = "", line: int = 0):
        super().__init__(fields)
        self.where = f"{file}:{line}" if file else "a row"

    def __missing__(self, field: str):
        raise ValueError(f"{self.where}: no field {field!r}; the fields are {', '.join(self)}")

    def text(self, field: str) -> str:
        """The text in `field`; a number or a boolean as it is printed."""
        value = self[field]
        if value is None or isinstance(value, list | dict):
            raise ValueError(f"{self.where}: {field!r} is {str(value)[:60]}, expected a text")
        return str(value)

    def label(self, field: str, labels: Sequence[str]) -> str:
        """The label name in `field`, which holds a name or an index into `labels`.

        Where there are numbers among the names, a number is a name; so are true and false. -1 is a
        row without label, as the test splits of GLUE have them: T5's text is `<unk>`.
        """
        value = self[field]
        if isinstance(value, bool):
            names = {name.lower(): name for name in labels}
            value = names.get(str(value).lower(), int(value))
        elif isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, str | int) and str(value) in labels:
            return str(value)
        numbers = any(re.fullmatch("-?[0-9]+", name) for name in labels)
        if isinstance(value, str) and not numbers and re.fullmatch("-?[0-9]{1,9}", value):
            value = int(value)
        if isinstance(value, str) or isinstance(value, int) and numbers:
            raise ValueError(f"{self.where}: the label {value!r} is not one of {', '.join(labels)}")
        if not isinstance(value, int) or not -1 <= value < len(labels):
            raise ValueError(
                f"{self.where}: the label is {value!r}, expected 0 to {len(labels) - 1} "
                f"({', '.join(labels)})"
            )
        return "<unk>" if value == -1 else labels[value]


def read(path: Path) -> Iterator[Row]:
    """Rows of a `.jsonl`, `.json`, `.csv` or `.tsv` file (also `.gz`), in UTF-8 (BOM or not).

    Raises:
      ValueError: no such file, another ending, a malformed line (named), or no row at all.
    """
    path = pathlib.Path(path)
    suffixes = path.suffixes[-2:]
    kind = suffixes[-2] if path.suffix == ".gz" and len(suffixes) > 1 else path.suffix
    readers = {".jsonl": _json_lines, ".json": _json_lines, ".csv": _table, ".tsv": _table}
    if kind not in readers:
        raise ValueError(f"{str(path)!r}: expected a file ending in .jsonl, .csv or .tsv (or .gz)")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as lines:
            count = 0
            for number, fields in readers[kind](path, lines, "\t" if kind == ".tsv" else ","):
                count += 1
                yield Row(fields, str(path), number)
    except FileNotFoundError:
        raise ValueError(f"no such file: {str(path)!r}") from None
    except (UnicodeDecodeError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from None
    if not count:
        raise ValueError(f"{str(path)!r} is empty: expected at least one row")


def _json_lines(path: pathlib.Path, lines, _) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: malformed JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, got {line.strip()[:60]!r}")
        if "\\u" in line:  # Only an escape can make text that no encoding holds.
            try:
                json.dumps(fields, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise ValueError(f"{path}:{number}: half of a surrogate pair is no text") from None
        yield number, fields


def _table(path: pathlib.Path, lines, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        header = reader.fieldnames or []
        if reader.fieldnames == []:
            raise ValueError(f"{path}:1: expected the names of the columns, got a blank line")
        if twice := sorted({name or "no name" for name in header if header.count(name) > 1}):
            raise ValueError(f"{path}:1: the header has {', '.join(twice)} twice")
        for fields in reader:
            if None in fields or None in fields.values():
                raise ValueError(
                    f"{path}:{reader.line_num}: expected {len(reader.fieldnames)} columns "
                    f"({', '.join(reader.fieldnames)})"
                )
            if delimiter == "\t" and any("\t" in x and "\n" in x for x in fields.values()):
                # Files with plain quotation marks: a row that begins with one would swallow others.
                raise ValueError(
                    f"{path}:{reader.line_num}: a text in quotation marks holds tabs and line "
                    f"breaks; expected plain quotation marks doubled, or the file as JSON Lines"
                )
            yield reader.line_num, fields
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: malformed CSV: {error}") from None


def fill(template: str, row: Row) -> str:
    """A text template such as `"review: {text}"` with the row's fields in it."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"malformed template {template!r}: {error}") from None
    if all(field is None for _, field, _, _ in parts):
        raise ValueError(
            f"the template {template!r} names no field of a row, expected one such as {{text}}"
        )
    text = []
    for literal, field, spec, conversion in parts:
        text.append(literal)
        if field is None:
            continue
        if spec or conversion or not field:
            raise ValueError(f"malformed template {template!r}: expected plain {{field}} names")
        text.append(row.text(field))
    return "".join(text)


def to_pair(row: Row, template: str, target: str, labels: Sequence[str] | None) -> tuple[str, str]:
    """(text, target text) of a row."""
    text = fill(template, row)
    return text, row.label(target, labels) if labels is not None else row.text(target)


def read_pairs(
    path: Path, template: str, target: str, labels: Sequence[str] | None
) -> list[tuple[str, str]]:
    """(text, target text) pairs of a file."""
    return [to_pair(row, template, target, labels) for row in read(path)]


@dataclasses.dataclass(frozen=True)
class Embedded:
    """How a data set that the package carries becomes text."""

    template: str
    labels: tuple[str, ...]


EMBEDDED_FOLDER = pathlib.Path(__file__).parent.parent / "softprompt" / "embedded" / "data"
if not EMBEDDED_FOLDER.is_dir():  # Installed: this package lies inside softprompt.
    EMBEDDED_FOLDER = pathlib.Path(__file__).parent.parent / "embedded" / "data"

EMBEDDED = {
    "sentiment": Embedded("sentence: {text}", ("negative", "positive")),
    "question_type": Embedded(
        "question: {text}", ("person", "place", "time", "number", "thing", "reason")
    ),
    "entailment": Embedded(
        "hypothesis: {hypothesis} premise: {premise}", ("entailment", "not_entailment")
    ),
}
