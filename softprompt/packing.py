"""Packing: several prompted examples in a row, each behind its own prompt."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from softprompt import data
from softprompt.logbook import track

# A row of this share of tokens is full enough; longer ones cost more attention than they save
# (but on a CPU: see `segments`).
FULL = 0.92
# Examples of a batch, to its size.
TOO_MANY = 1.25


@dataclasses.dataclass(frozen=True)
class Packing:
    """Shuffled batches whose rows hold several examples, each behind its own prompt.

    Calling it with a step gives endless batches from that step on: `encoder_ids` and
    `encoder_segments` `[R, T]`, `targets` and `decoder_segments` `[R, L]`. Segments number the
    examples of a row from 1; 0 is padding. How many examples a batch holds varies by a few; every
    example is still taken once an epoch, in an order close to that of `data.train_batches`. Around
    an epoch's end one may come twice in a batch.

    Attributes:
      parts, rates, seed, slots: see `data.train_batches`.
      batch_size: examples per batch, on the average, unless R is rounded up.
      length: T, tokens of an encoder row, slots included.
      rows_multiple: R is rounded up to it (the mesh's data axis).
      own: the rows that batches hold, of all R: see `data.train_batches`.
      label_length: M, tokens of the longest label, where the loss is that among labels (else 0).
        Targets then lie M columns apart, `[R, S·M]`, S the most examples that a row can hold.
    """

    parts: Sequence[data.Examples]
    rates: Sequence[float]
    batch_size: int
    seed: int
    slots: np.ndarray
    length: int
    rows_multiple: int = 1
    own: slice = dataclasses.field(default_factory=lambda: slice(None))
    label_length: int = 0

    def __post_init__(self):
        need = len(self.slots) + max(len(ids) for part in self.parts for ids in part.inputs)
        if self.length < need:
            raise ValueError(
                f"PACK_LENGTH is {self.length}, but the longest input with its prompt has {need} "
                f"tokens: expected as many at least, or 'auto'"
            )

    def _mean(self, feature: str) -> float:
        """Mean length of `inputs` or `targets` in the mixture."""
        means = [np.mean([len(ids) for ids in getattr(part, feature)]) for part in self.parts]
        return float(np.average(means, weights=self.rates))

    @functools.cached_property
    def shape(self) -> tuple[int, int, int]:
        """R, T and L."""
        each = len(self.slots) + self._mean("inputs")
        rows = data.round_up(max(1, round(self.batch_size * each / (0.97 * self.length))),
                        self.rows_multiple)  # fmt: skip
        if self.label_length:
            return rows, self.length, self.segments * self.label_length
        # Room for the targets of a full row, half as long again as they are on the average.
        targets = data.round_up(int(1.5 * self.length / each * self._mean("targets")) + 1)
        longest = max(data.longest(part.targets) for part in self.parts)
        return rows, self.length, max(targets, longest)

    @functools.cached_property
    def segments(self) -> int:
        """S, the most examples that a row can hold."""
        shortest = min(len(ids) for part in self.parts for ids in part.inputs)
        return self.length // (len(self.slots) + shortest)

    def rows(self) -> Iterator[list[list[tuple[data.Examples, int]]]]:
        """The examples of every row, batch by batch, from the first batch on."""
        count, length, targets_length = self.shape
        # Twice what a batch's rows hold, where that is much more than BATCH_SIZE asks for.
        room = count * length / (len(self.slots) + self._mean("inputs"))
        pool = max(4 * self.batch_size, 2 * round(room))
        stream = itertools.chain.from_iterable(
            data.drawn(self.parts, self.rates, self.batch_size, self.seed)
        )
        # The examples that wait, oldest first: enough to find one for every gap.
        waiting: list[tuple[data.Examples, int]] = []
        sizes = np.zeros((0, 2), np.int64)  # Of each its input with the slots, and its target.
        while True:
            batch = []
            for _ in range(count):
                new = list(itertools.islice(stream, pool - len(waiting)))
                waiting += new
                added = [
                    (len(self.slots) + len(part.inputs[i]), len(part.targets[i])) for part, i in new
                ]
                sizes = np.concatenate([sizes, np.reshape(added, (-1, 2)).astype(np.int64)])
                row, free = [], np.array([length, targets_length])
                while True:
                    # The oldest one opens the row, then the longest one that fits follows.
                    fits = (sizes[: None if row else 1] <= free).all(1)
                    if not fits.any():
                        break
                    k = int(np.where(fits, sizes[: len(fits), 0], -1).argmax())
                    free -= sizes[k]
                    sizes = np.delete(sizes, k, 0)
                    row.append(waiting.pop(k))
                batch.append(row)
            yield batch

    def __call__(self, start: int) -> Iterator[data.Batch]:
        rows = self.rows()
        if start:  # What goes into a batch depends on all that went before.
            for _ in track(itertools.islice(rows, start), "packing anew", "batches", start):
                pass
        for batch in rows:
            yield self.pack(batch[self.own])

    def pack(self, batch: Sequence[Sequence[tuple[data.Examples, int]]]) -> data.Batch:
        """Arrays of a batch, from the examples of every row."""
        _, length, targets_length = self.shape
        packed = {
            name: np.zeros((len(batch), width), np.int32)
            for name, width in (
                ("encoder_ids", length),
                ("encoder_segments", length),
                ("targets", targets_length),
                ("decoder_segments", targets_length),
            )
        }
        for r, row in enumerate(batch):
            at = {"encoder": 0, "decoder": 0}
            for number, (part, i) in enumerate(row, 1):
                inputs = np.concatenate([self.slots, part.inputs[i]])
                for side, name, ids in (
                    ("encoder", "encoder_ids", inputs),
                    ("decoder", "targets", part.targets[i]),
                ):
                    place = slice(at[side], at[side] + len(ids))
                    packed[name][r, place] = ids
                    packed[f"{side}_segments"][r, place] = number
                    at[side] += len(ids)
                if self.label_length:
                    at["decoder"] = number * self.label_length
        return packed

    def fill(self, batches: int = 20) -> tuple[float, float]:
        """Share of encoder positions that are no padding, and examples per batch: means."""
        sample = [self.pack(batch) for batch in itertools.islice(self.rows(), batches)]
        share = np.mean([(batch["encoder_segments"] > 0).mean() for batch in sample])
        examples = np.mean([batch["encoder_segments"].max(-1).sum() for batch in sample])
        return float(share), float(examples)


def row_length(
    parts: Sequence[data.Examples],
    rates: Sequence[float],
    batch_size: int,
    seed: int,
    slots: np.ndarray,
    rows_multiple: int = 1,
) -> int:
    """The shortest row for `Packing` that gets `FULL`, else the fullest one.

    Rows of which a batch would hold `TOO_MANY` times `batch_size` examples, since the mesh and the
    microbatches divide their number, are taken only if all are such.

    Rows from the longest example to four times that are tried on 100 batches: the first few find
    their gaps easier to fill than those after them. Short rows are the cheaper ones: attention
    costs the square of a row.
    """
    need = len(slots) + max(len(ids) for part in parts for ids in part.inputs)
    fullest = (False, 0.0, 0)
    for length in np.unique(np.geomspace(need, 4 * need, 24).round().astype(int)):
        length = data.round_up(int(length))
        packing = Packing(parts, rates, batch_size, seed, slots, length, rows_multiple)
        share, count = packing.fill(100)
        as_asked = count < TOO_MANY * batch_size
        if share >= FULL and as_asked:
            return length
        fullest = max(fullest, (as_asked, share, length))
    return fullest[-1]
