"""T5X with google-research/prompt-tuning, a side of `benchmarks/peers.py` in its own interpreter.

    python benchmarks/t5x_worker.py SETTINGS

Calls, answers and settings are those of `worker.py`. The model, optimizer, trainer, partitioner
and checkpointer are what the two projects' own gin files bind, those that a user names to train a
prompt; only activations in float32, no dropout and a vocabulary that needs no file are bound
besides. Nothing comes from seqio's tasks: batches are given in the model's feature format.
"""

import pathlib

import numpy as np
import worker

GIN_FILES = (
    "prompt_tuning/configs/models/t5_1_1_small_prompt.gin",
    "prompt_tuning/configs/runs/prompt_finetune.gin",
)


def train(**bound) -> dict:
    """Stands where T5X's launcher has its train loop: returns what the gin files bind to it."""
    return bound


def configure(settings: dict) -> dict:
    """The arguments of T5X's train loop as the gin files give them."""
    import flaxformer
    import prompt_tuning
    import t5x
    from t5x import gin_utils

    import gin

    paths = [
        str(pathlib.Path(list(x.__path__)[0]).parent) for x in (t5x, flaxformer, prompt_tuning)
    ]
    bindings = [
        "from __gin__ import dynamic_registration",
        "import seqio",
        f"ACTIVATION_DTYPE = '{settings['dtype']}'",
        "DROPOUT_RATE = 0.0",
        f"PROMPT_LENGTH = {settings['prompt_length']}",
        f"NUM_ENCODER_LAYERS = {settings['architecture']['layers']}",
        f"NUM_DECODER_LAYERS = {settings['architecture']['layers']}",
        f"NUM_EMBEDDINGS = {worker.ROWS}",
        "VOCABULARY = @seqio.PassThroughVocabulary()",
        f"seqio.PassThroughVocabulary.size = {worker.ROWS}",
        "seqio.PassThroughVocabulary.eos_id = 1",
        # Required by the run, used by nothing here: no task is read and no checkpoint restored.
        "MIXTURE_OR_TASK_NAME = ''",
        "TASK_FEATURE_LENGTHS = {}",
        "TRAIN_STEPS = 1",
        "MODEL_DIR = ''",
        "INITIAL_CHECKPOINT_PATH = ''",
    ]
    bound = gin.configurable(train)
    gin_utils.parse_gin_flags(paths, list(GIN_FILES), bindings)
    return bound()


class T5x:
    """T5X's trainer and decoder: `train` padded to 512 or to 128, `decode` at 512."""

    def __init__(self, settings: dict):
        import jax
        from t5x import utils

        self.jax, self.settings = jax, settings
        bound = configure(settings)
        self.model, self.partitioner = bound["model"], bound["partitioner"]
        self.saving = bound["checkpoint_cfg"].save
        utils.set_hardware_rng_ops()  # As T5X does where a run names no seed.
        rows = settings["batch_size"]
        shapes = {"encoder_input_tokens": (rows, 128)}
        for name in ("decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights"):
            shapes[name] = (rows, settings["decode_length"])
        initializer = utils.TrainStateInitializer(
            optimizer_def=self.model.optimizer_def,
            init_fn=self.model.get_initial_variables,
            input_shapes=shapes,
            input_types={name: np.int32 for name in shapes},
            partitioner=self.partitioner,
        )
        self.shapes, axes = initializer.global_train_state_shape, initializer.train_state_axes
        self.trainer = bound["trainer_cls"](
            model=self.model,
            train_state=initializer.from_scratch(jax.random.PRNGKey(0)),
            partitioner=self.partitioner,
            eval_names=[],
            summary_dir=None,
            train_state_axes=axes,
            rng=jax.random.PRNGKey(0),
        )
        self.predict = self.partitioner.partition(
            self.model.predict_batch,
            in_axis_resources=(axes.params, self.partitioner.data_partition_spec),
            out_axis_resources=None,
        )

    def batches(self, case: str, task: str, layout: str) -> list:
        found = []
        for inputs, targets in worker.groups(self.settings, case, task, layout):
            labels = worker.padded(targets, self.settings["decode_length"], 0, np.int32)
            found.append(
                {
                    "encoder_input_tokens": worker.padded(inputs, int(layout), 0, np.int32),
                    "decoder_input_tokens": np.pad(labels, ((0, 0), (1, 0)))[:, :-1],
                    "decoder_target_tokens": labels,
                    "decoder_loss_weights": (labels > 0).astype(np.int32),
                }
            )
        return found

    def width(self, batch) -> int:
        """Tokens of the longest example: the padded width is one for all."""
        return int((batch["encoder_input_tokens"] > 0).sum(1).max())

    def counts(self, case: str, batch) -> dict:
        del case
        ids, prompt = batch["encoder_input_tokens"], self.settings["prompt_length"]
        rows, width = ids.shape
        filled = int((ids > 0).sum()) + rows * prompt
        return {"examples": rows, "filled": filled, "positions": rows * (width + prompt)}

    def run(self, case: str, task: str, batch) -> None:
        if case == "train":
            self.trainer.train(iter([batch]), 1)
            self.jax.block_until_ready(self.trainer.train_state)
        else:
            np.asarray(self.predict(self.trainer.train_state.params, batch))

    def checkpoint(self, folder: str) -> None:
        checkpointer = self.saving.checkpointer_cls(
            train_state=self.shapes,
            partitioner=self.partitioner,
            checkpoints_dir=folder,
            keep=self.saving.keep,
            save_dtype=self.saving.dtype,
        )
        checkpointer.save(self.trainer.train_state)


if __name__ == "__main__":
    worker.serve(T5x)
