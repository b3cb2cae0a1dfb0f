"""Hugging Face's format of T5: `config.json`, `model.safetensors` or its shards, tokenizer.

Covers T5 1.0, T5 1.1, LM-adapted T5, Flan-T5, mT5 and ByT5. A PyTorch weight is `[out, in]`, a
kernel `[in, out]`: most tensors are transposed.
"""

import json
import os
import pathlib
import re
from typing import Any

import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from softprompt import checkpoint
from softprompt.formats import tokenizer
from softprompt.formats.stored import Stored
from softprompt.t5_config import T5Config
from softprompt.vocabulary import (
    AnyVocabulary,
    ByteVocabulary,
    open_vocabulary,
)

MODEL_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
VOCABULARY_FILE = "spiece.model"
BYT5 = "ByT5Tokenizer"
# The first four have no default.
SIZES = (
    "vocab_size", "d_model", "num_heads", "num_layers", "num_decoder_layers", "d_kv", "d_ff",
    "relative_attention_num_buckets", "relative_attention_max_distance",
)  # fmt: skip
SHARD_BYTES = 5_000_000_000

ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}
# feed_forward_proj -> activations. transformers takes the tanh approximation for "gated-gelu".
ACTIVATIONS = {
    "relu": ("relu",),
    "gated-gelu": ("gelu", "linear"),
    "gated-silu": ("silu", "linear"),
    "gated-relu": ("relu", "linear"),
}
SHARED = "shared.weight"
HEAD = "lm_head.weight"
# Copies of the shared embedding, and a table that T5's first PyTorch port created but never used.
REDUNDANT = (
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
)


def table(cfg: T5Config) -> dict[str, tuple[str, bool]]:
    """Our path -> (their name, whether it is transposed), for every parameter."""
    rows = {
        "token_embedder/embedding": (SHARED, False),
        "encoder/encoder_norm/scale": ("encoder.final_layer_norm.weight", False),
        "decoder/decoder_norm/scale": ("decoder.final_layer_norm.weight", False),
    }
    if not cfg.logits_via_embedding:
        rows["decoder/logits_dense/kernel"] = (HEAD, True)
    wi = ["wi"] if len(cfg.mlp_activations) == 1 else ["wi_0", "wi_1"]
    stacks = {
        "encoder": (
            cfg.num_encoder_layers,
            [("attention", "SelfAttention", "pre_attention_layer_norm")],
        ),
        "decoder": (
            cfg.num_decoder_layers,
            [
                ("self_attention", "SelfAttention", "pre_self_attention_layer_norm"),
                ("encoder_decoder_attention", "EncDecAttention", "pre_cross_attention_layer_norm"),
            ],
        ),
    }
    for stack, (count, attentions) in stacks.items():
        first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        rows[f"{stack}/relpos_bias/rel_embedding"] = (first, True)
        for i in range(count):
            ours, theirs = f"{stack}/layers_{i}", f"{stack}.block.{i}.layer"
            for j, (name, module, norm) in enumerate(attentions):
                rows[f"{ours}/{norm}/scale"] = (f"{theirs}.{j}.layer_norm.weight", False)
                for kernel, letter in ATTENTION.items():
                    rows[f"{ours}/{name}/{kernel}/kernel"] = (
                        f"{theirs}.{j}.{module}.{letter}.weight",
                        True,
                    )
            last = len(attentions)
            rows[f"{ours}/pre_mlp_layer_norm/scale"] = (f"{theirs}.{last}.layer_norm.weight", False)
            for kernel in [*wi, "wo"]:
                rows[f"{ours}/mlp/{kernel}/kernel"] = (
                    f"{theirs}.{last}.DenseReluDense.{kernel}.weight",
                    True,
                )
    return rows


# --- the hub ------------------------------------------------------------------------------------


def is_hub_name(name: str) -> bool:
    """Whether it reads as `owner/model`, or as one of the hub's names without owner."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+|t5-(small|base|large|3b|11b)", name))


def download(name: str) -> pathlib.Path:
    """The folder of a hub model in the user's cache; what is cached is found without a network."""
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(
            f"the backbone {name!r} (INITIAL_CHECKPOINT_PATH) does not exist; for it to name a "
            f"model of the Hugging Face hub, install huggingface_hub (pip install huggingface_hub)"
        ) from None
    wanted = ["config.json", "*.safetensors", INDEX_FILE, "spiece.model", "tokenizer_config.json",
              "added_tokens.json", tokenizer.FILE]  # fmt: skip
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the backbone {name!r} (INITIAL_CHECKPOINT_PATH) does not exist, and the Hugging "
            f"Face hub did not give a model of that name: {reason}"
        ) from None


# --- reading ------------------------------------------------------------------------------------


def holds(folder: pathlib.Path) -> bool:
    """Whether this is a Hugging Face folder, of whatever model."""
    return (folder / "config.json").is_file()


def _architecture(folder: pathlib.Path) -> tuple[T5Config, bool, dict[str, Any]]:
    """The architecture (head as stated), whether logits are scaled by 1/sqrt(H), the whole config.

    transformers 5 ties the head of every T5 and keeps in `scale_decoder_outputs` what
    `tie_word_embeddings` used to mean; what the weights hold decides.
    """
    file = folder / "config.json"
    config = checkpoint.read_object(file)
    kind = config.get("model_type")
    if kind not in ("t5", "mt5"):
        raise ValueError(f"{str(file)!r} is of the model type {kind!r}, expected 't5' or 'mt5'")
    projection = config.get("feed_forward_proj", "relu")
    if projection not in ACTIVATIONS:
        raise ValueError(
            f"{str(file)!r}: feed_forward_proj is {projection!r}, expected one of "
            f"{', '.join(ACTIVATIONS)}"
        )
    if (epsilon := config.get("layer_norm_epsilon", 1e-6)) != 1e-6:
        raise ValueError(f"{str(file)!r}: layer_norm_epsilon is {epsilon}, expected 1e-6")
    missing = [k for k in SIZES[:4] if config.get(k) is None]
    if missing:
        raise ValueError(f"{str(file)!r} lacks {', '.join(missing)}")
    for name in SIZES:
        size = config.get(name)
        if size is not None and (not isinstance(size, int) or size < 1):
            raise ValueError(f"{str(file)!r}: {name} is {size!r}, expected a positive integer")
    tied = config.get("tie_word_embeddings", kind == "t5")
    # transformers 5 ties an mT5 without a word on scaling, and never scales it.
    version = str(config.get("transformers_version", "4")).split(".")[0]
    scaled = tied and not (kind == "mt5" and version.isdigit() and int(version) >= 5)
    cfg = T5Config(
        vocab_size=config["vocab_size"],
        emb_dim=config["d_model"],
        num_heads=config["num_heads"],
        num_encoder_layers=config["num_layers"],
        num_decoder_layers=config.get("num_decoder_layers") or config["num_layers"],
        head_dim=config.get("d_kv") or 64,
        mlp_dim=config.get("d_ff") or 2048,
        mlp_activations=ACTIVATIONS[projection],
        relative_buckets=config.get("relative_attention_num_buckets") or 32,
        relative_max_distance=config.get("relative_attention_max_distance") or 128,
    )
    return cfg, config.get("scale_decoder_outputs", scaled), config


class _Weights:
    """Tensors of one file or of the shards that an index names."""

    def __init__(self, folder: pathlib.Path):
        if (folder / INDEX_FILE).is_file():
            index = checkpoint.read_object(folder / INDEX_FILE).get("weight_map")
            if not isinstance(index, dict) or not all(isinstance(x, str) for x in index.values()):
                raise checkpoint.CorruptFile(
                    f"{str(folder / INDEX_FILE)!r} has no weight_map from tensors to files"
                )
            files = {name: folder / file for name, file in index.items()}
        elif (folder / MODEL_FILE).is_file():
            files = None
        else:
            pickled = sorted(p.name for p in folder.glob("*.bin")) or sorted(
                p.name for p in folder.glob("*.pt*")
            )
            if pickled:
                raise ValueError(
                    f"{str(folder)!r} holds its weights only pickled ({pickled[0]}), and "
                    f"unpickling runs whatever code the file carries; load it with transformers, "
                    f"then write it with save_pretrained(…, safe_serialization=True)"
                )
            raise ValueError(
                f"{str(folder)!r} holds a config.json but no {MODEL_FILE}; where a hub model is "
                f"only pickled, load it with transformers and write it with save_pretrained"
            )
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._of: dict[str, pathlib.Path] = {}
        for path in sorted(set(files.values())) if files else [folder / MODEL_FILE]:
            try:
                with safetensors.safe_open(path, "numpy") as file:
                    for name in file.keys():
                        self._of[name] = path
                        self.shapes[name] = tuple(file.get_slice(name).get_shape())
            except FileNotFoundError:
                raise ValueError(f"{str(folder)!r}: its index names {path.name!r}, which is "
                                 f"not there") from None  # fmt: skip
            except (safetensors.SafetensorError, OSError) as error:
                raise checkpoint.CorruptFile(
                    f"{str(path)!r} is torn or is no safetensors file: {error}"
                ) from None
        absent = sorted(set(files or ()) - set(self.shapes))
        if absent:
            raise ValueError(f"{str(folder)!r}: shards lack {', '.join(absent[:8])}")

    def read(self, name: str) -> np.ndarray:
        return checkpoint.read_tensor(self._of[name], name)


def open_stored(
    folder: str | os.PathLike,
    vocabulary_file: str | os.PathLike | None = None,
    name: str | None = None,
) -> Stored:
    """Opens a folder that transformers' `save_pretrained` wrote."""
    folder = pathlib.Path(folder)
    cfg, scaled, config = _architecture(folder)
    weights = _Weights(folder)
    # Of tensors that share memory, safetensors' own writer keeps any one.
    embedding = next((n for n in (SHARED, *REDUNDANT[:2]) if n in weights.shapes), SHARED)
    tied = HEAD not in weights.shapes or (
        scaled and np.array_equal(weights.read(HEAD), weights.read(embedding))
    )
    if not tied and scaled:
        raise ValueError(
            f"{str(folder)!r}: config.json says that the output head is tied to the embedding, but "
            f"{HEAD} holds other values than {embedding}"
        )
    if tied and scaled:
        cfg = T5Config.from_json({**cfg.to_json(), "logits_via_embedding": True})
    elif tied and config.get("tie_word_embeddings") is False:
        raise ValueError(
            f"{str(folder)!r}: config.json says that the output head is a matrix of its own, but "
            f"there is no {HEAD}"
        )
    rows = table(cfg)
    rows["token_embedder/embedding"] = (embedding, False)
    if tied and not scaled:
        # A tied head without T5 1.0's scaling is an untied one of the same values.
        rows["decoder/logits_dense/kernel"] = (embedding, True)
    names = {theirs for theirs, _ in rows.values()}
    problems = [f"missing {n}" for n in sorted(names) if n not in weights.shapes]
    allowed = {*names, *REDUNDANT, SHARED, HEAD}
    problems += [f"unexpected {n}" for n in sorted(weights.shapes) if n not in allowed]
    if problems:
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(
            f"{str(folder)!r}: config.json and weights disagree: {'; '.join(problems[:20])}{more}"
        )

    def read(path: str) -> np.ndarray:
        theirs, transposed = rows[path]
        x = weights.read(theirs)
        return np.ascontiguousarray(x.T) if transposed else x

    def shape(theirs: str, transposed: bool) -> tuple[int, ...]:
        return weights.shapes[theirs][::-1] if transposed else weights.shapes[theirs]

    return Stored(
        where=str(folder),
        name=name or config.get("_name_or_path") or folder.resolve().name,
        cfg=cfg,
        shapes={ours: shape(*row) for ours, row in rows.items()},
        read=read,
        vocabulary=_vocabulary(folder, vocabulary_file),
        metadata={"config": config},
    )


def _vocabulary(folder: pathlib.Path, given: str | os.PathLike | None) -> AnyVocabulary | None:
    if given is not None:
        return open_vocabulary(given)
    file: pathlib.Path | None = folder / VOCABULARY_FILE
    if not file.is_file():
        for about in (folder / "tokenizer_config.json", folder / "config.json"):
            if about.is_file() and checkpoint.read_object(about).get("tokenizer_class") == BYT5:
                return ByteVocabulary()
        if not (folder / tokenizer.FILE).is_file():
            return None
        file = tokenizer.sentencepiece_file(folder / tokenizer.FILE)
        if file is None:
            return None
    vocabulary = open_vocabulary(file)
    if added := _added_tokens(folder, vocabulary.size):
        raise ValueError(
            f"{str(folder)!r}: its tokenizer has {', '.join(map(repr, added[:8]))} beyond the "
            f"pieces of its SentencePiece model, which texts would lack here; to go without, name "
            f"{str(file)!r} as VOCABULARY_FILE"
        )
    return vocabulary


def _added_tokens(folder: pathlib.Path, size: int) -> list[str]:
    """Tokens with an id from `size` on, which transformers keeps beside the SentencePiece model.

    Sentinels are not among them.
    """
    added: dict[str, Any] = {}
    if not (folder / VOCABULARY_FILE).is_file():
        added |= tokenizer.added_tokens(checkpoint.read_object(folder / tokenizer.FILE))
    if (folder / "added_tokens.json").is_file():
        added |= checkpoint.read_object(folder / "added_tokens.json")
    if (folder / "tokenizer_config.json").is_file():
        config = checkpoint.read_object(folder / "tokenizer_config.json")
        tokens = config.get("added_tokens_decoder")
        for number, token in tokens.items() if isinstance(tokens, dict) else ():
            if isinstance(token, dict) and number.isdecimal():
                added[str(token.get("content"))] = int(number)
    return [x for x, number in added.items() if number >= size and "<extra_id_" not in x]


# --- writing ------------------------------------------------------------------------------------


def save(folder: str | os.PathLike, source: Stored, dtype: str | None = None) -> None:
    """Writes a folder for transformers' `T5ForConditionalGeneration.from_pretrained`.

    Weights as they are, or as 'float32' or 'bfloat16'; files of at most `SHARD_BYTES`.
    """
    folder, cfg = pathlib.Path(folder), source.cfg
    kinds = {activations: kind for kind, activations in ACTIVATIONS.items()}
    if cfg.mlp_activations not in kinds:
        raise ValueError(f"transformers has no T5 with the activations {cfg.mlp_activations}")
    folder.mkdir(parents=True, exist_ok=True)
    files, shard, size, total, types = [], {}, 0, 0, set()

    def flush() -> None:
        files.append(list(shard))
        path = folder / f"{len(files)}.{MODEL_FILE}"
        safetensors_numpy.save_file(shard, path, metadata={"format": "pt"})
        shard.clear()

    for ours, (theirs, transposed) in table(cfg).items():
        x = source.read_as(ours, dtype)
        types.add(str(x.dtype))
        if shard and size + x.nbytes > SHARD_BYTES:
            flush()
            size = 0
        shard[theirs] = np.ascontiguousarray(x.T if transposed else x)
        size += x.nbytes
        total += x.nbytes
    flush()
    names = [MODEL_FILE]
    if len(files) > 1:
        names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
        index = {name: file for file, inside in zip(names, files, strict=True) for name in inside}
        content = {"metadata": {"total_size": total}, "weight_map": index}
        checkpoint.write_atomically(folder / INDEX_FILE, json.dumps(content, indent=2).encode())
    for i, name in enumerate(names, 1):
        os.replace(folder / f"{i}.{MODEL_FILE}", folder / name)
    config = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "_name_or_path": source.name,
        "vocab_size": cfg.vocab_size,
        "d_model": cfg.emb_dim,
        "d_kv": cfg.head_dim,
        "d_ff": cfg.mlp_dim,
        "num_heads": cfg.num_heads,
        "num_layers": cfg.num_encoder_layers,
        "num_decoder_layers": cfg.num_decoder_layers,
        "feed_forward_proj": kinds[cfg.mlp_activations],
        "relative_attention_num_buckets": cfg.relative_buckets,
        "relative_attention_max_distance": cfg.relative_max_distance,
        "tie_word_embeddings": cfg.logits_via_embedding,
        "scale_decoder_outputs": cfg.logits_via_embedding,
        "layer_norm_epsilon": 1e-6,
        "is_encoder_decoder": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "torch_dtype": types.pop() if len(types) == 1 else "float32",
    }
    if isinstance(source.vocabulary, ByteVocabulary):
        about = {"tokenizer_class": BYT5, "extra_ids": ByteVocabulary.extra_ids}
    else:
        about = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, "legacy": True}
        if source.vocabulary is not None:
            content = pathlib.Path(source.vocabulary.path).read_bytes()
            checkpoint.write_atomically(folder / VOCABULARY_FILE, content)
            about["extra_ids"] = source.vocabulary.extra_ids
    for file, content in (("config.json", config), ("tokenizer_config.json", about)):
        checkpoint.write_atomically(folder / file, json.dumps(content, indent=2).encode())
