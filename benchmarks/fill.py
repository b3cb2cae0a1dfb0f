"""How full packed rows, length buckets and an evaluation's batches are, on SuperGLUE.

    python benchmarks/fill.py --data_dir=DIR --vocabulary_file=spiece.model

For each task the row length that PACK_LENGTH 'auto' finds, the share of its positions that hold a
token or a slot, and the same share with one and with five length buckets: means over 100 batches of
the training set. Then the same share of the validation set's batches, twice as large, and how many
shapes they have: with the lengths that `softprompt infer` keeps to, and as they are chosen for one
evaluation, and for one of many.
"""

import argparse
import os

from softprompt import data, lengths, packing
from softprompt.prompted import slots

TASKS = ("wic", "copa", "wsc", "rte", "cb", "boolq", "multirc")


def read(task: str, split: str, feature_lengths: dict[str, int]) -> data.Examples:
    """A split of the task, tokenised."""
    import softprompt.tasks.registry  # noqa: F401

    return data.from_task(data.get_tasks(f"super_glue_{task}")[0][0], split, feature_lengths)


def line(task: str, part: data.Examples, batch_size: int, prompt_length: int) -> str:
    """A row of the table."""
    drawing = ([part], [1.0], batch_size, 0, slots(32128, prompt_length))
    packed = packing.Packing(*drawing, packing.row_length(*drawing))
    share, count = packed.fill(100)
    one, _ = lengths.padding(data.train_batches(*drawing)(0))
    five, shapes = lengths.padding(lengths.bucketed_batches(*drawing, 5)(0))
    return (
        f"| {task} | {packed.shape[0]} × {packed.length} | {100 * share:.1f}% | {count:.1f} | "
        f"{100 * one:.1f}% | {100 * five:.1f}% | {', '.join(map(str, shapes))} |"
    )


def evaluated(task: str, part: data.Examples, batch_size: int, prompt_length: int) -> str:
    """A row of the second table."""
    sizes = [len(ids) for ids in part.inputs]
    filled = sum(sizes) + len(sizes) * prompt_length
    found = []
    for evaluations in (None, 1, lengths.MANY_EVALUATIONS):
        cuts = lengths.cuts(sizes, batch_size, prompt_length, evaluations=evaluations)
        positions = sum(cut.rows * (prompt_length + cut.length) for cut in cuts)
        shapes = {(cut.rows, cut.length) for cut in cuts}
        found.append(f"{100 * filled / positions:.1f}% | {len(shapes)}")
    return f"| {task} | {len(sizes):,} | {' | '.join(found)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, help="folder of JSON Lines data sets")
    parser.add_argument("--vocabulary_file", required=True, help="T5's SentencePiece model")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--prompt_length", type=int, default=100)
    args = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from softprompt.tasks import catalogue, sources

    sources.use_data_dir(args.data_dir)
    catalogue.use_vocabulary(args.vocabulary_file)
    feature_lengths = {"inputs": 512, "targets": 16}
    print("| task | packed rows | full | examples a batch | one shape | five buckets | lengths |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for task in TASKS:
        part = read(task, "train", feature_lengths)
        print(line(task, part, args.batch_size, args.prompt_length), flush=True)
    print("\n| task | validation examples | fixed | shapes | once | shapes | often | shapes |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for task in TASKS:
        part = read(task, "validation", feature_lengths)
        print(evaluated(task, part, 2 * args.batch_size, args.prompt_length), flush=True)


if __name__ == "__main__":
    main()
