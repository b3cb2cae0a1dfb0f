"""T5X as a host: our model, tasks and initialisers under `python -m t5x.train | eval | infer`.

Needs T5X (github.com/google-research/t5x), which is on no registry. `gin/t5x/` holds the run files;
model, prompt and task gin files are those of our own binaries. A host's checkpoints hold the whole
model and, as `prompt/bank`, the prompt; `softprompt convert --to prompt` lifts it out.
"""

import functools
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import seqio
from flax import serialization, traverse_util
from t5x import metrics as t5x_metrics
from t5x import models, optimizers

from softprompt import (
    data,
    decode,
    dropout,
    eval_task,
    formats,
    losses,
    optim,
    prompt,
    prompted,
    t5_config,
    tree,
)
from softprompt.tasks import catalogue, features, sources
from softprompt.train import PROMPT
from softprompt.vocabulary import open_vocabulary

PEERS_PROMPT = "encoder/prompt/prompt/prompt"


class PartitionOptimizer(optimizers.OptaxWrapper):
    """An optax optimizer for the trainable partition; the rest has no state and stays as it is.

    Args:
      optimizer: for the trainable parameters.
      trainable, frozen: patterns over whole parameter paths, as in `tree.split`.
    """

    def __init__(
        self,
        optimizer: optax.GradientTransformation,
        trainable: Sequence[str] = ("prompt/.*",),
        frozen: Sequence[str] = (".*",),
    ):
        super().__init__(optimizer)
        self.split = functools.partial(tree.split, trainable=trainable, frozen=frozen)

    def _trainable(self, params: Any) -> dict[str, Any]:
        return tree.unflatten(self.split(_flatten(params))[0])

    def init_state(self, params):
        """State of the trainable parameters alone."""
        state = self.optax_optimizer.init(self._trainable(params))
        return optimizers.OptimizerState(step=0, param_states=state)

    def apply_gradient(self, hyper_params, params, state, grads):
        """Moves the trainable parameters; the others are passed on untouched."""
        del hyper_params
        trainable, frozen = self.split(_flatten(params))
        trainable = tree.unflatten(trainable)
        updates, new_state = self.optax_optimizer.update(
            self._trainable(grads), state.param_states, trainable
        )
        moved = _flatten(optax.apply_updates(trainable, updates))
        new_params = _like(params, {**frozen, **moved})
        return new_params, optimizers.OptimizerState(step=state.step + 1, param_states=new_state)

    def derive_logical_axes(self, optimizer, param_logical_axes):
        """A moment lies as its parameter does where their shapes agree; all else is replicated."""
        axes, params = _flatten(param_logical_axes), _flatten(optimizer.target)
        trained = self.split(params)[0]

        def place(path, leaf):
            names = "/".join(str(getattr(key, "key", "")) for key in path)
            for name, param in trained.items():
                if names.endswith(f"/{name}") and param.shape == leaf.shape:
                    return axes[name]
            return None

        places = jax.tree_util.tree_map_with_path(place, optimizer.state.param_states)
        state = optimizers.OptimizerState(step=None, param_states=places)
        return optimizer.replace(state=state, target=param_logical_axes)


def _flatten(params: Any) -> tree.Flat:
    return tree.flatten(serialization.to_state_dict(params))


def _like(params: Any, flat: Mapping[str, Any]) -> Any:
    """A flat tree in the containers of `params`."""
    leaves = {tuple(path.split("/")): x for path, x in flat.items()}
    return serialization.from_state_dict(params, traverse_util.unflatten_dict(leaves))


class PromptedModel(models.BaseTransformerModel):
    """A prompted T5 as T5X's trainer, evaluator and inference know models.

    The prompt comes from the checkpoint that T5X restores or, where that holds none, from
    `prompt_file` or `prompt_init`; see `restore_prompt`.

    Args:
      architecture: a key of `t5_config.SIZES`; None takes that of the checkpoint.
      checkpoint_path: the T5X checkpoint whose embedding the initialisers see.
      vocabulary_file: a SentencePiece model, 'bytes' or 'embedded'; T5X's checkpoints hold none.
      mixture_or_task_name: whose labels `prompt_init` may use.
      mixture_or_task_module: imported first, for it registers the task.
      prompt_length: P; not used with `prompt_file`.
      prompt_init: an initialiser of `softprompt.prompt`; None where the checkpoint has the prompt.
      prompt_file: a prompt in any format that `softprompt convert` reads.
      optimizer: a function that gives the optax optimizer (None: no training).
      beams: beam search with so many beams; 1 is greedy.
      data_dir: folder of local data sets, as `--data_dir` of our own binaries.
    """

    FEATURE_CONVERTER_CLS = seqio.EncDecFeatureConverter

    def __init__(
        self,
        architecture: str | None,
        checkpoint_path: str,
        vocabulary_file: str | None,
        mixture_or_task_name: str | None = None,
        mixture_or_task_module: str | None = "softprompt.tasks.registry",
        prompt_length: int = 100,
        prompt_init: prompt.Initializer | None = None,
        prompt_file: str | None = None,
        seed: int = 0,
        optimizer: Callable[[], optax.GradientTransformation] | None = optim.adafactor,
        trainable: Sequence[str] = ("prompt/.*",),
        frozen: Sequence[str] = (".*",),
        dropout_rate: float = 0.0,
        dtype: str = "float32",
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        beams: int = 1,
        data_dir: str | os.PathLike | None = None,
    ):
        if vocabulary_file is None:
            raise ValueError(
                "give VOCABULARY_FILE, a SentencePiece model: T5X's checkpoints hold no vocabulary"
            )
        self._vocabulary = open_vocabulary(vocabulary_file)
        catalogue.use_vocabulary(self._vocabulary.path)
        if data_dir is not None:
            sources.use_data_dir(data_dir)
        if mixture_or_task_module:
            importlib.import_module(mixture_or_task_module)
        self._stored = functools.lru_cache(1)(lambda: formats.open_stored(checkpoint_path))
        if architecture is None:
            sizes = self._stored().cfg.to_json()
            cfg = t5_config.T5Config.from_json(
                sizes, dropout_rate=dropout_rate, dtype=jnp.dtype(dtype)
            )
        else:
            cfg = t5_config.config(architecture, dropout_rate, dtype)
        self._given = None
        if prompt_file is not None:
            self._given, _ = prompt.load(prompt_file)
            if self._given.shape[1] != cfg.emb_dim:
                raise ValueError(
                    f"the prompt {prompt_file!r} has width {self._given.shape[1]}, the backbone "
                    f"has {cfg.emb_dim}"
                )
            prompt_length = len(self._given)
        self.cfg, self.beams, self._seed = cfg, beams, seed
        self._prompt_init, self._task = prompt_init, mixture_or_task_name
        self._slots = prompted.slots(cfg.vocab_size, prompt_length)
        partition_optimizer = None
        if optimizer is not None:
            partition_optimizer = PartitionOptimizer(optimizer(), trainable, frozen)
        super().__init__(
            module=prompted.PromptedT5(cfg, prompt_length),
            input_vocabulary=features.VOCABULARY,
            output_vocabulary=features.VOCABULARY,
            optimizer_def=partition_optimizer,
            z_loss=z_loss,
            label_smoothing=label_smoothing,
        )

    @functools.cached_property
    def initial_prompt(self) -> np.ndarray | None:
        """The prompt `[P, H]` that training starts from; None where nothing says which."""
        if self._given is not None or self._prompt_init is None:
            return self._given
        stored, labels = self._stored(), None
        if self._task is not None:
            labels = eval_task.label_classes(data.get_tasks(self._task)[0][0])
        embedding = np.asarray(stored.read("token_embedder/embedding"), np.float32)
        source = prompt.Source(embedding, self._vocabulary, labels)
        return self._prompt_init(jax.random.key(self._seed), len(self._slots), source)

    def _with_slots(self, tokens: jax.Array) -> jax.Array:
        """Ids `[B, P + T]`: the prompt's slots before the tokens `[B, T]`."""
        tokens = jnp.asarray(tokens, jnp.int32)
        front = jnp.broadcast_to(jnp.asarray(self._slots), (len(tokens), len(self._slots)))
        return jnp.concatenate([front, tokens], axis=1)

    def get_initial_variables(self, rng, input_shapes, input_types=None):
        """Variables as the module draws them, the prompt as the initialiser gives it."""
        del input_types
        ids = [
            jnp.ones(input_shapes[f"{x}_input_tokens"], jnp.int32) for x in ("encoder", "decoder")
        ]
        variables = dict(self.module.init(rng, self._with_slots(ids[0]), ids[1]))
        with jax.ensure_compile_time_eval():
            array = self.initial_prompt
        if array is not None:
            flat = tree.flatten(variables["params"])
            variables["params"] = tree.unflatten({**flat, PROMPT: jnp.asarray(array)})
        return variables

    def _compute_logits(self, params, batch, dropout_rng=None):
        ids = self._with_slots(batch["encoder_input_tokens"])
        targets = batch["decoder_input_tokens"]
        masks = None
        if dropout_rng is not None and self.cfg.dropout_rate:
            masks = dropout.draw(dropout_rng, self.cfg, *ids.shape, targets.shape[1])
        return self.module.apply({"params": params}, ids, targets, dropout_masks=masks)

    def loss_fn(self, params, batch, dropout_rng):
        """Mean cross-entropy in nats per target token, as our own trainer has it; T5X's metrics."""
        logits = self._compute_logits(params, batch, dropout_rng)
        targets = batch["decoder_target_tokens"]
        total, count = losses.cross_entropy(logits, targets, self._z_loss, self._label_smoothing)
        found: t5x_metrics.MetricsMap = self._compute_metrics(
            logits=logits,
            targets=targets,
            mask=(targets > 0).astype(jnp.float32),
            loss=total,
            segment_ids={
                name: batch[name] > 0 for name in ("encoder_input_tokens", "decoder_target_tokens")
            },
        )
        return total / count, found

    def predict_batch_with_aux(self, params, batch, rng=None, **unused):
        """Ids `[B, L]` of the answers."""
        del rng, unused
        ids = self._with_slots(batch["encoder_input_tokens"])
        length = batch["decoder_input_tokens"].shape[1]
        params = tree.unflatten(_flatten(params))
        encoded = decode.encode(self.module, params, ids)
        if self.beams > 1:
            answers, scores = decode.beam(self.module, params, encoded, length, self.beams)
            return answers, {"scores": scores}
        return decode.greedy(self.module, params, encoded, length), {}

    def score_batch(self, params, batch, return_intermediates=False):
        """Log-likelihood `[B]` of the targets."""
        if return_intermediates:
            raise ValueError("PromptedModel.score_batch returns no intermediates")
        logits = self._compute_logits(params, batch)
        scores = losses.token_log_likelihood(logits, batch["decoder_target_tokens"])
        return (scores * batch["decoder_loss_weights"]).sum(-1)


def restore_prompt(
    stored: Mapping[str, Any],
    expected: Mapping[str, Any],
    *,
    is_resuming: bool = False,
    from_scratch: bool = False,
    prompt_file: str | None = None,
) -> Mapping[str, Any]:
    """T5X's hook on the way from a checkpoint to a train state: whence the prompt comes.

    A run that goes on after a stop takes everything from its own checkpoint. Else the optimizer's
    state and the step count of the pre-training are left behind, and the prompt is

    - with `from_scratch` (training), what the model's initialiser gives;
    - with `prompt_file` (evaluation, inference), what that file holds;
    - else the checkpoint's own, which may be one of google-research/prompt-tuning.

    Raises:
      ValueError: a prompt both in the checkpoint and in a file, or in neither.
    """
    del expected
    if is_resuming:
        return stored
    target = dict(stored["target"])
    flat = traverse_util.flatten_dict(
        target, is_leaf=lambda _, x: isinstance(x, Mapping) and "driver" in x, sep="/"
    )
    found = {name: flat.pop(name) for name in (PROMPT, PEERS_PROMPT) if name in flat}
    if from_scratch:
        return {"target": traverse_util.unflatten_dict(flat, sep="/")}
    if prompt_file is not None and found:
        raise ValueError(
            f"the checkpoint holds a prompt ({', '.join(found)}), and PROMPT_FILE is "
            f"{prompt_file!r}: which one? Give PROMPT_FILE=None, or a checkpoint without a prompt"
        )
    if prompt_file is None and not found:
        raise ValueError("the checkpoint holds no prompt: give PROMPT_FILE")
    if found:
        flat[PROMPT] = next(iter(found.values()))
    restored = {"target": traverse_util.unflatten_dict(flat, sep="/")}
    if "step" in stored.get("state", {}):
        restored["state"] = {"step": stored["state"]["step"]}
    return restored
