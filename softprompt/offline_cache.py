"""seqio's offline caches: where a task's is, and that its files are whole and of its vocabulary."""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from softprompt.logbook import say
from softprompt.tasks import catalogue
from softprompt.vocabulary import EOS_ID


def folder_of(task: Any, split: str) -> str | None:
    """The folder of a task's offline cache in seqio's cache directories, None where there is none.

    Where there are such directories and none has the task, a line says so. A cache without the
    split is an error: the source is never taken in its place.
    """
    import seqio
    import tensorflow as tf

    folders = seqio.get_global_cache_dirs()
    if not folders:
        return None
    if not (task.supports_caching and task.cache_dir):
        why = "none has it" if task.supports_caching else "it has no seqio.CacheDatasetPlaceholder"
        say(f"{task.name}: {split} is read from its source, not from {', '.join(folders)}: {why}")
        return None
    if not tf.io.gfile.exists(seqio.utils.get_cached_info_path(task.cache_dir, split)):
        raise ValueError(f"the cache {task.cache_dir!r} of {task.name} has no split {split!r}")
    _check(task, split)
    return task.cache_dir


def _check(task: Any, split: str) -> None:
    """Raises where a file of a task's cache is missing, or is not what seqio writes; names it."""
    import seqio
    import tensorflow as tf

    path = seqio.utils.get_cached_info_path(task.cache_dir, split)
    info = _object(path)
    shards, version = info.get("num_shards"), info.get("seqio_version")
    if not isinstance(shards, int) or shards < 1:
        raise ValueError(f"{path!r}: num_shards is {shards!r}, expected a number of files")
    if version is not None and not re.match(r"\d+(\.\d+)*", str(version)):
        raise ValueError(f"{path!r}: seqio_version is {version!r}, expected one such as '0.0.20'")
    features = info.get("features")
    for name in catalogue.features_of(task):
        found = features.get(name) if isinstance(features, dict) else None
        kind = found.get("dtype") if isinstance(found, dict) else found
        expected = tf.as_dtype(task.output_features[name].dtype).name
        if kind != expected:
            raise ValueError(f"{path!r}: the feature {name!r} is {kind!r}, expected {expected!r}")
    prefix = seqio.utils.get_cached_tfrecord_prefix(task.cache_dir, split)
    there = {os.path.basename(x) for x in tf.io.gfile.glob(f"{prefix}-*")}
    for i in range(shards):
        shard = f"{prefix}-{i:05d}-of-{shards:05d}"
        if os.path.basename(shard) not in there:
            raise ValueError(f"the cache of {task.name} lacks {shard!r}: make it anew")


def _object(path: str) -> dict[str, Any]:
    """The JSON object in a file of an offline cache."""
    import tensorflow as tf

    try:
        with tf.io.gfile.GFile(path) as file:
            found = json.loads(file.read())
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, expected an object")
    except (ValueError, tf.errors.OpError) as error:
        raise ValueError(f"{path!r}, of an offline cache, cannot be read: {error}") from None
    return found


def check_tokens(task: Any, records: Sequence[Mapping[str, Any]]) -> None:
    """Raises unless most of a sample of cached tokens are those of the task's vocabulary.

    In whatever order: of pieces that tie, TensorFlow Text may take others first. What preprocessors
    left out or put in is no sign of another vocabulary.
    """
    for feature in catalogue.features_of(task):
        vocabulary = task.output_features[feature].vocabulary
        odd = total = 0
        for record in records[:: max(1, len(records) // 32)]:
            text = record.get(f"{feature}_pretokenized")
            if text is None:
                continue
            found = Counter(i for i in record[feature].tolist() if i != EOS_ID)
            odd += (found - Counter(vocabulary.encode(text.decode("utf-8")))).total()
            total += found.total()
        if 2 * odd > total:
            raise ValueError(
                f"the cache {task.cache_dir!r} of {task.name} was tokenised by another vocabulary "
                f"than the backbone's: make it anew, or leave out its folder"
            )
