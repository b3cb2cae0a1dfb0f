"""Prompt files: ours, NumPy arrays, T5X checkpoints that carry a prompt, PEFT's adapter folders.

Every one becomes `[P, H]` float32 and a dictionary that says what is known of it. Only our own
files hold deep prompts, whose further rows `[D - 1, P, H]` lie beside it as the tensor 'deep'.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from softprompt import checkpoint
from softprompt.formats import t5x

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_MODEL = "adapter_model.safetensors"
PEFT_NAME = "prompt_embeddings"
SUFFIX = ".safetensors"

Prompt = tuple[np.ndarray, dict[str, Any]]


def read(path: str | os.PathLike) -> Prompt:
    """A prompt `[P, H]` float32 and what its file says of it.

    A deep prompt is an error (`read_deep` takes both); for the rest see there.
    """
    array, deep, metadata = read_deep(path)
    if deep is not None:
        raise ValueError(
            f"{str(path)!r} is a deep prompt, with rows for {len(deep) + 1} encoder layers; a "
            f"plain one, [P, H], is expected here"
        )
    return array, metadata


def read_deep(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray | None, dict[str, Any]]:
    """A prompt `[P, H]` float32, its rows of deeper layers, and what its file says of it.

    The second is `[D - 1, P, H]` float32, or None of a plain prompt.

    Args:
      path: `.safetensors` (ours), `.npy` (`[P, H]`, as google-research/prompt-tuning writes), a
        T5X checkpoint that holds a prompt (folder or `gs://` URL), or a PEFT adapter folder.

    Raises:
      ValueError: not there, or no prompt.
      checkpoint.CorruptFile: torn or altered.
    """
    where, deep = pathlib.Path(path), None
    if "://" in str(path):
        array, metadata = _of_t5x(str(path))
    elif where.suffix == ".npy":
        array, metadata = _of_numpy(where)
    elif (where / ADAPTER_CONFIG).is_file():
        array, metadata = _of_peft(where)
    elif where.is_dir() and t5x.holds(where):
        array, metadata = _of_t5x(str(where))
    elif where.is_dir():
        raise ValueError(
            f"{str(path)!r} holds no prompt: expected a .safetensors or .npy file, a T5X "
            f"checkpoint or a PEFT adapter folder"
        )
    else:
        array, deep, metadata = _of_ours(where)
    if array.ndim != 2 or array.dtype.kind not in "fV" or not len(array):
        raise ValueError(
            f"{str(path)!r} is no prompt: it holds {array.dtype} of shape {array.shape}, "
            f"expected floats [P, H]"
        )
    array = np.asarray(array).astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{str(path)!r} holds numbers that are not finite")
    return array, deep, metadata


def _of_ours(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray | None, dict[str, Any]]:
    arrays, metadata = checkpoint.read(path)
    if set(arrays) not in ({"prompt"}, {"prompt", "deep"}):
        raise ValueError(f"{str(path)!r} is no prompt: it holds {', '.join(sorted(arrays))}")
    array, deep = arrays["prompt"], arrays.get("deep")
    if deep is not None and (deep.shape[1:] != array.shape or not np.isfinite(deep).all()):
        raise ValueError(
            f"{str(path)!r} is no prompt: its deep rows have shape {deep.shape}, expected finite "
            f"numbers (layers - 1, {', '.join(map(str, array.shape))})"
        )
    return array, deep, metadata


def _of_numpy(path: pathlib.Path) -> Prompt:
    try:
        array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("it is an archive of arrays")
        # NumPy's files have no name for bfloat16: it comes back as two bytes of anything.
        return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array, {}
    except FileNotFoundError:
        raise ValueError(f"no such file: {str(path)!r}") from None
    except (ValueError, EOFError, OSError) as error:
        raise checkpoint.CorruptFile(f"{str(path)!r} is no NumPy array: {error}") from None


def _of_t5x(where: str) -> Prompt:
    arrays = t5x.Arrays(where)
    for name in t5x.PROMPTS:
        if name in arrays.shapes:
            return arrays.read(name), {"source": where, "parameter": name}
    raise ValueError(
        f"{where!r} is a T5X checkpoint without a prompt: it has no {' or '.join(t5x.PROMPTS)}"
    )


def _of_peft(folder: pathlib.Path) -> Prompt:
    """PEFT's prompt tuning of a T5.

    With its default of two transformer submodules the file holds 2 P rows: PEFT puts the first P
    before the encoder's input and never uses the others.
    """
    config = checkpoint.read_object(folder / ADAPTER_CONFIG)
    if config.get("peft_type") != "PROMPT_TUNING":
        raise ValueError(
            f"{str(folder)!r} is a PEFT adapter of type {config.get('peft_type')!r}, expected "
            f"'PROMPT_TUNING'"
        )
    path = folder / ADAPTER_MODEL
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        raise ValueError(
            f"{str(folder)!r} holds its weights only pickled (adapter_model.bin), and unpickling "
            f"runs whatever code the file carries; load it with peft, then write it with "
            f"save_pretrained(…, safe_serialization=True)"
        )
    try:
        arrays = safetensors_numpy.load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{str(folder)!r} holds no {ADAPTER_MODEL}") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise checkpoint.CorruptFile(
            f"{str(path)!r} is torn or is no safetensors file: {error}"
        ) from None
    if set(arrays) != {PEFT_NAME}:
        raise ValueError(
            f"{str(path)!r} holds {', '.join(sorted(arrays)) or 'nothing'}, expected {PEFT_NAME}"
        )
    array = arrays[PEFT_NAME]
    length, modules = config.get("num_virtual_tokens"), config.get("num_transformer_submodules")
    modules = 1 if modules is None else modules
    for name, value in (("num_virtual_tokens", length), ("num_transformer_submodules", modules)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{str(folder / ADAPTER_CONFIG)!r}: {name} is {value!r}, expected an integer of at "
                f"least 1"
            )
    expected = (length * modules, config.get("token_dim"))
    if array.shape != expected:
        raise ValueError(
            f"{str(path)!r} has shape {array.shape}, its {ADAPTER_CONFIG} says {expected} "
            f"(num_virtual_tokens × num_transformer_submodules, token_dim)"
        )
    metadata = {"source": str(folder), "backbone": config.get("base_model_name_or_path")}
    if len(array) > length:
        metadata["note"] = (
            f"PEFT stored {len(array)} rows for {length} virtual tokens "
            f"(num_transformer_submodules={modules}); it only ever uses the first {length}, which "
            f"are these"
        )
    return array[:length], metadata


def write(
    path: str | os.PathLike,
    array: np.ndarray,
    metadata: Mapping[str, Any],
    deep: np.ndarray | None = None,
) -> None:
    """Writes a prompt `[P, H]`, and `deep` `[D - 1, P, H]`, as ours (`.safetensors`).

    Another ending is an error: what reads prompts would take the file for another kind.
    """
    if pathlib.Path(path).suffix != SUFFIX:
        raise ValueError(f"cannot save a prompt as {str(path)!r}, expected a name in {SUFFIX}")
    arrays = {"prompt": np.asarray(array, np.float32)}
    if deep is not None:
        arrays["deep"] = np.asarray(deep, np.float32)
    checkpoint.write(path, arrays, metadata)


def write_numpy(path: str | os.PathLike, array: np.ndarray, metadata: Mapping[str, Any]) -> None:
    """Writes `[P, H]` float32 as `.npy`; the metadata is lost."""
    del metadata
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        np.save(file, np.asarray(array, np.float32))


def write_peft(path: str | os.PathLike, array: np.ndarray, metadata: Mapping[str, Any]) -> None:
    """Writes a folder for `PeftModel.from_pretrained(t5, path)`, without unused rows."""
    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "SEQ_2_SEQ_LM",
        "base_model_name_or_path": metadata.get("backbone") or "",
        "num_virtual_tokens": array.shape[0],
        "token_dim": array.shape[1],
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
        "inference_mode": True,
    }
    tensors = {PEFT_NAME: np.asarray(array, np.float32)}
    safetensors_numpy.save_file(tensors, folder / ADAPTER_MODEL, metadata={"format": "pt"})
    checkpoint.write_atomically(folder / ADAPTER_CONFIG, json.dumps(config, indent=2).encode())
