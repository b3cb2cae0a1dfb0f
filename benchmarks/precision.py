"""What bfloat16 and int8 cost: the loss of the embedded backbone in each type.

    python benchmarks/precision.py [--corpus DIR] [--backbone PATH]

Mean cross-entropy in nats per target token, without a prompt: of the embedded data sets'
validation targets and, with --corpus (a folder of text shards as `softprompt train` reads them for
pre-training), of both pre-training tasks on their first --examples held-out examples.
"""

import argparse

from softprompt import api, data, evaluation
from softprompt import backbone as backbones

TYPES = (("float32", None), ("float32", "int8"), ("bfloat16", None), ("bfloat16", "int8"))
DATA = ("sentiment", "question_type", "entailment")
LENGTHS = {"inputs": 129, "targets": 129}
TASKS = {"span corruption": "pretrain_span_corruption_dense", "prefix LM": "pretrain_prefix_lm"}


def held_out(args: argparse.Namespace, vocabulary) -> dict[str, data.Examples]:
    """Examples by name."""
    found = {
        name: data.from_pairs(api.embedded_data(name).validation, vocabulary, LENGTHS, name)
        for name in DATA
    }
    if args.corpus:
        from softprompt.tasks import catalogue, pretraining

        catalogue.use_vocabulary(vocabulary.path)
        pretraining.use_corpus(args.corpus)
        for name, task in TASKS.items():
            task = data.get_tasks(task)[0][0]
            found[name] = data.first_examples(task, "validation", LENGTHS, args.examples)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="embedded")
    parser.add_argument("--corpus", help="folder of text shards")
    parser.add_argument("--examples", type=int, default=256, help="of the corpus")
    args = parser.parse_args()
    examples = None
    for dtype, weights in TYPES:
        backbone = backbones.load(args.backbone, dtype, weights=weights)
        if examples is None:
            examples = held_out(args, backbone.vocabulary)
            print("| weights | activations |", " | ".join(examples), "|")
            print("| --- " * (2 + len(examples)) + "|", flush=True)
        predictor = evaluation.Predictor(backbone, 0, evaluation.GENERATE, 32, 1)
        found = [predictor.loss(backbone.params, x) for x in examples.values()]
        cells = " | ".join(f"{x:.4f}" for x in found)
        print(f"| {weights or dtype} | {dtype} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
