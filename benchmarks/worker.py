"""One side of `benchmarks/peers.py`, in its own interpreter: calls as JSON lines, answers likewise.

    python benchmarks/worker.py SETTINGS

SETTINGS is a JSON object: `side` (ours, peft; T5X has `t5x_worker.py`, with the same calls),
`tokens` (an .npz of `peers.py`), `device` (cpu or gpu), `architecture` (of a T5 1.1, see
`peers.py`), `dtype`, `weights` and `remat` (of ours), `batch_size`, `prompt_length`,
`decode_length`, `batches` (of a case), `decode_batches` (where inputs are decoded by length),
`cpu_devices` (of ours: what `softprompt --cpu_devices` is), `cpu_time` (one thread, and the
process's own CPU seconds instead of the clock's), `training` (of ours: whether the process is one
of trainings or of evaluations). Weights are random.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import sys
import time

import numpy as np

ROWS = 32128  # Of T5's embedding.


def read_tokens(path: str, task: str, split: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Inputs and targets, a token array for each example."""
    with np.load(path) as file:
        found = []
        for feature in ("inputs", "targets"):
            flat, ends = (file[f"{task}/{split}/{feature}/{kind}"] for kind in ("ids", "ends"))
            found.append([x.astype(np.int32) for x in np.split(flat, ends[:-1])])
    return found[0], found[1]


def groups(settings: dict, case: str, task: str, layout: str) -> list[tuple[list, list]]:
    """The peers' batches, as inputs and targets: in random order, or by length (`sorted`)."""
    inputs, targets = read_tokens(
        settings["tokens"], task, "train" if case == "train" else "validation"
    )
    size = settings["batch_size"] * (1 if case == "train" else 2)
    if layout == "512":
        size = size // 2  # What fits: the peers' own users halve it.
    order = np.random.default_rng(0).permutation(len(inputs))
    if layout == "sorted":
        order = np.argsort([len(x) for x in inputs], kind="stable")
    # Sorted, none is left out: the last would hold the longest.
    whole = len(order) if layout == "sorted" else len(order) // size * size
    chunks = [order[start : start + size] for start in range(0, whole, size)]
    return [([inputs[i] for i in x], [targets[i] for i in x]) for x in chunks]


def padded(rows: list[np.ndarray], width: int, fill: int, dtype: type) -> np.ndarray:
    """Rows cut or filled up to one width."""
    found = np.full((len(rows), width), fill, dtype)
    for row, tokens in zip(found, rows, strict=True):
        row[: len(tokens)] = tokens[:width]
    return found


def spread(widths: list[int], count: int) -> list[int]:
    """Indices of `count` batches at evenly spaced quantiles of their width."""
    order = np.argsort(widths, kind="stable")
    count = min(count, len(order))
    return [int(order[int((k + 0.5) * len(order) / count)]) for k in range(count)]


class Ours:
    """This project: `train` in length buckets or packed, `decode` and `rank` as it evaluates."""

    def __init__(self, settings: dict):
        import jax

        from softprompt import heap

        # Before the first device is asked for: see `--cpu_devices` of the command line.
        heap.keep()  # As all commands do.
        if settings["training"]:
            heap.compute_within_calls()
        jax.config.update("jax_num_cpu_devices", settings["cpu_devices"])
        if (found := jax.default_backend()) != settings["device"]:
            raise ValueError(
                f"JAX computes on the {found}, expected the {settings['device']}: install its "
                f"build for that device"
            )
        from softprompt import (
            backbone,
            data,
            decode,
            lengths,
            optim,
            packing,
            partition,
            prompted,
            t5_config,
            throughput,
            train,
            train_step,
            tree,
            xla,
        )

        self.jax, self.data, self.lengths, self.packing = jax, data, lengths, packing
        self.settings = settings
        made = settings["architecture"]
        cfg = dataclasses.replace(
            t5_config.config("t5_1_1_small", dtype=settings["dtype"]), remat=settings["remat"],
            emb_dim=made["width"], num_heads=made["heads"], mlp_dim=made["mlp"],
            num_encoder_layers=made["layers"], num_decoder_layers=made["layers"],
        )  # fmt: skip
        rows = settings["prompt_length"]
        self.cfg, self.throughput, self.prompted = cfg, throughput, prompted
        self.slots = prompted.slots(cfg.vocab_size, rows)
        # Placed as `train.fit` does, so that the first step compiles what all others run.
        self.devices = settings["cpu_devices"] if jax.default_backend() == "cpu" else 1
        mesh = partition.make_mesh(devices=self.devices)
        self.rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        put = lambda x: jax.device_put(x, partition.replicated(mesh))  # noqa: E731

        def draw(key: jax.Array, x: jax.ShapeDtypeStruct, path: str) -> jax.Array:
            """A tensor, drawn where it stays: a large model's has no room on the host."""
            if x.dtype == np.int8:
                return jax.random.randint(key, x.shape, -127, 128, np.int8)
            if path.endswith(":scale"):
                return jax.numpy.full(x.shape, 0.05 / 73, x.dtype)
            return 0.05 * jax.random.normal(key, x.shape, x.dtype)

        make = jax.jit(draw, static_argnums=(1, 2))
        layout = backbone.layout(cfg, mesh, settings["weights"])
        frozen = {}
        for i, (path, x) in enumerate(layout.items()):
            drawn = make(jax.random.key(i), jax.ShapeDtypeStruct(x.shape, x.dtype), path[-6:])
            if jax.default_backend() == "cpu":  # As `backbone.load` places it.
                drawn = partition.place_frozen(np.asarray(drawn), x.dtype, x.sharding)
            frozen[path] = jax.device_put(drawn, x.sharding)
        bank = np.random.default_rng(0).uniform(-0.5, 0.5, (rows, cfg.emb_dim))
        trainable = {train.PROMPT: put(bank.astype(np.float32))}
        module, optimizer = prompted.PromptedT5(cfg, rows), optim.adafactor()
        self.state = train_step.init_state(trainable, optimizer, mesh)
        self.frozen = frozen
        self.step = train_step.jit_step(train_step.make_step(module, optimizer))
        length = settings["decode_length"]
        params = lambda flat: tree.unflatten({**flat, **trainable})  # noqa: E731
        self.encode = jax.jit(lambda flat, ids: decode.encode(module, params(flat), ids))
        self.greedy = jax.jit(
            lambda flat, encoded: decode.greedy(module, params(flat), encoded, length),
            compiler_options=xla.loop_options(cfg.dtype),
        )
        self.score = jax.jit(
            lambda flat, ids, labels: decode.score_labels(module, params(flat), ids, labels)
        )

    def examples(self, task: str, split: str):
        inputs, targets = read_tokens(self.settings["tokens"], task, split)
        return self.data.Examples(task, inputs, targets, [{}] * len(inputs), {})

    def batches(self, case: str, task: str, layout: str) -> list:
        size = self.settings["batch_size"]
        if case == "train":
            part = self.examples(task, "train")
            drawing = ([part], [1.0], size, 0, self.slots)
            if layout == "packed":
                length = self.packing.row_length(*drawing, self.devices)
                stream = self.packing.Packing(*drawing, length, self.devices)(0)
            else:
                stream = self.lengths.bucketed_batches(*drawing, 5)(0)
            return [next(stream) for _ in range(max(1, len(part) // size))]
        found = self.examples(task, "validation")
        cuts = self.lengths.cuts(
            list(map(len, found.inputs)), 2 * size, len(self.slots), self.devices,
            self.lengths.MANY_EVALUATIONS,
        )  # fmt: skip
        batches = self.lengths.eval_batches(found, cuts, [self.slots] * len(found), len(self.slots))
        return [batch for _, batch in batches]

    def width(self, batch) -> int:
        return batch["encoder_ids"].shape[1]

    def counts(self, case: str, batch) -> dict:
        ids = batch["encoder_ids"]
        if "encoder_segments" in batch:
            examples = int(batch["encoder_segments"].max(-1).sum())
            lengths = self.throughput.example_lengths(batch)
        else:
            examples = int((ids > 0).any(-1).sum())
            # Rows past the examples are padding.
            lengths = [
                np.count_nonzero(batch[k][:examples], axis=1) for k in ("encoder_ids", "targets")
            ]
        passes = 1
        if case == "train":
            passes = 2
        elif case == "decode":
            lengths[1] = np.full(examples, self.settings["decode_length"])
        else:
            lengths[1] = np.full(examples, self._labels(batch).size)
        return {
            "examples": examples,
            "filled": int((ids > 0).sum()),
            "positions": ids.size,
            "flops": passes * self.throughput.forward_flops(self.cfg, *lengths),
        }

    def run(self, case: str, task: str, batch) -> None:
        batch = self.jax.device_put(batch, self.rows)
        if case == "train":
            self.state = self.step(self.state, self.frozen, batch)
            self.jax.block_until_ready(self.state)
        elif case == "decode":
            np.asarray(self.greedy(self.frozen, self.encode(self.frozen, batch["encoder_ids"])))
        else:
            np.asarray(self.score(self.frozen, batch["encoder_ids"], self._labels(batch)))

    def _labels(self, batch) -> np.ndarray:
        """Two as long as the targets: their tokens make no difference to the time."""
        targets = np.asarray(batch["targets"])
        return np.resize(targets, (2, targets.shape[1]))

    def peak(self, clock) -> float:
        return self.throughput.measure_peak(self.settings["dtype"], clock)

    def memory(self) -> int:
        """Most bytes that were ever taken on the GPU."""
        return self.jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]

    def checkpoint(self, folder: str) -> None:
        from softprompt import checkpoint

        checkpoint.save_state(folder, self.state, {"best": {}, "identity": {}}, 2)


class Peft:
    """PEFT's prompt tuning on PyTorch: `train` at 512 or padded to the longest, `decode` sorted."""

    def __init__(self, settings: dict):
        import torch
        from peft import PromptTuningConfig, TaskType, get_peft_model
        from transformers import T5Config, T5ForConditionalGeneration

        self.torch, self.settings = torch, settings
        torch.manual_seed(0)
        made = settings["architecture"]
        cfg = T5Config(
            vocab_size=ROWS, d_model=made["width"], d_kv=64, d_ff=made["mlp"],
            num_layers=made["layers"], num_decoder_layers=made["layers"],
            num_heads=made["heads"], feed_forward_proj="gated-gelu", tie_word_embeddings=False,
            dropout_rate=0.0, decoder_start_token_id=0,
        )  # fmt: skip
        self.device = torch.device("cuda" if settings["device"] == "gpu" else "cpu")
        # Made where and as what it stays: a large model has no room on the host.
        torch.set_default_dtype(getattr(torch, settings["dtype"]))
        with self.device:
            backbone = T5ForConditionalGeneration(cfg)
        torch.set_default_dtype(torch.float32)
        kind = PromptTuningConfig(
            task_type=TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=settings["prompt_length"]
        )
        # Its attention is the fastest that the model has: PyTorch's own scaled dot product.
        self.model = get_peft_model(backbone, kind).to(self.device)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.3)

    def batches(self, case: str, task: str, layout: str) -> list:
        found = []
        for inputs, targets in groups(self.settings, case, task, layout):
            width = 512 if layout == "512" else max(len(x) for x in inputs)
            batch = {
                "input_ids": padded(inputs, width, 0, np.int64),
                "labels": padded(targets, max(len(x) for x in targets), -100, np.int64),
            }
            batch = {name: self.torch.from_numpy(x) for name, x in batch.items()}
            found.append({**batch, "attention_mask": (batch["input_ids"] > 0).long()})
        return found

    def width(self, batch) -> int:
        return batch["input_ids"].shape[1]

    def counts(self, case: str, batch) -> dict:
        del case
        prompt = self.settings["prompt_length"]
        rows, width = batch["input_ids"].shape
        filled = int(batch["attention_mask"].sum()) + rows * prompt
        return {"examples": rows, "filled": filled, "positions": rows * (width + prompt)}

    def run(self, case: str, task: str, batch) -> None:
        batch = {name: x.to(self.device) for name, x in batch.items()}
        if case == "train":
            self.model.train()
            self.model(**batch).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.settings["device"] == "gpu":
                self.torch.cuda.synchronize()
            return
        self.model.eval()
        with self.torch.no_grad():
            found = self.model.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                max_new_tokens=self.settings["decode_length"], do_sample=False, num_beams=1,
            )  # fmt: skip
            found.cpu()

    def memory(self) -> int:
        """Most bytes that were ever taken on the GPU."""
        return self.torch.cuda.max_memory_allocated()

    def checkpoint(self, folder: str) -> None:
        self.model.save_pretrained(folder)


def peak_memory() -> int:
    """Most bytes that this process ever had resident (Linux)."""
    status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def answer(side, settings: dict, prepared: dict, call: dict) -> dict:
    """What a call gives: see `peers.py`, which makes them."""
    name = call["call"]
    clock = time.process_time if settings["cpu_time"] else time.perf_counter
    if name == "memory":
        return {"bytes": side.memory() if settings["device"] == "gpu" else peak_memory()}
    if name == "peak":
        return {"flops": side.peak(clock)}
    if name == "checkpoint":
        began = time.perf_counter()
        side.checkpoint(call["folder"])
        seconds = time.perf_counter() - began
        files = [p for p in pathlib.Path(call["folder"]).rglob("*") if p.is_file()]
        return {"seconds": seconds, "bytes": sum(p.stat().st_size for p in files)}
    case, task, layout = key = (call["case"], call["task"], call["layout"])
    if name == "prepare":
        batches = side.batches(*key)
        often = case == "train" or layout == "512"
        count = call.get("batches", settings["batches" if often else "decode_batches"])
        chosen = spread([side.width(b) for b in batches], count)
        prepared[key] = [batches[i] for i in chosen]
        # One batch of each shape: what compiles does so here.
        shapes = {tuple(x.shape for x in batch.values()): batch for batch in prepared[key]}
        for batch in shapes.values():
            side.run(case, task, batch)
        found = [side.counts(case, batch) for batch in prepared[key]]
        return {name: sum(x[name] for x in found) for name in found[0]}
    began = clock()
    for batch in prepared[key]:
        side.run(case, task, batch)
    return {"seconds": clock() - began}


def serve(make) -> None:
    """Answer the calls on standard input with the side that `make(settings)` gives."""
    settings = json.loads(sys.argv[1])
    answers = sys.stdout
    if settings["cpu_time"]:
        os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
        os.environ["OMP_NUM_THREADS"] = "1"
    with contextlib.redirect_stdout(sys.stderr):
        side = make(settings)
        prepared: dict = {}
        for line in sys.stdin:
            print(json.dumps(answer(side, settings, prepared, json.loads(line))), file=answers,
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    serve(lambda settings: {"ours": Ours, "peft": Peft}[settings["side"]](settings))
