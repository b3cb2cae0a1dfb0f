"""Fixtures: the embedded backbone, a tiny random one, and data that only some machines have."""

import importlib.util
import os
import pathlib
import shutil
import tempfile

import jax
import numpy as np
import pytest

from softprompt import backbone as backbones
from softprompt import partition, t5_config
from softprompt.formats import Stored, native
from softprompt.vocabulary import Vocabulary

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

GOLDENS = pathlib.Path(__file__).parent / "goldens"
_spec = importlib.util.spec_from_file_location("goldens_t5", GOLDENS / "t5.py")
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

# A small T5 1.1 whose sizes all differ, so that no axis can be taken for another.
TINY = t5_config.T5Config(**{**golden.SIZES, "vocab_size": 8192})


def pytest_configure(config):
    """What one test compiles is there for all others, other processes' too, until the run ends."""
    if not hasattr(config, "workerinput"):  # Workers have the variables of who starts them.
        folder = tempfile.mkdtemp(prefix="softprompt_tests_")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        os.environ["SOFTPROMPT_CACHE_DIR"] = folder
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        # Most of the tests' time is compiling; their programs run for a moment.
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    fast = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
    jax.config.update("jax_disable_most_optimizations", fast)


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return Vocabulary(native.EMBEDDED / native.VOCABULARY_FILE)


@pytest.fixture(scope="session")
def tiny(vocabulary):
    """A random backbone with the embedded vocabulary, on one device."""
    return backbones.random(TINY, 0, vocabulary, partition.make_mesh(devices=1), "tiny")


@pytest.fixture(scope="session")
def tiny_folder(tiny, tmp_path_factory):
    """`tiny` as a folder, for INITIAL_CHECKPOINT_PATH."""
    folder = tmp_path_factory.mktemp("tiny") / "backbone"
    native.save(folder, Stored.of(tiny.name, tiny.cfg, tiny.params, tiny.vocabulary))
    return folder


@pytest.fixture(scope="session")
def embedded():
    return backbones.load("embedded")


@pytest.fixture(scope="session")
def pairs():
    """Twelve (text, target) pairs of two labels."""
    good = ["a fine film", "a lovely day", "I like it", "what a joy", "very good", "so warm"]
    bad = ["a dull film", "a grim day", "I hate it", "what a bore", "very bad", "so cold"]
    return [(t, "positive") for t in good] + [(t, "negative") for t in bad]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def folder_of(variable: str, what: str) -> pathlib.Path:
    """The folder that an environment variable names; the test skips where there is none."""
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set: it names {what}")
    return pathlib.Path(value)


@pytest.fixture(scope="session")
def task_data():
    return folder_of("SOFTPROMPT_TEST_DATA", "a folder of SuperGLUE and GLUE data as JSON Lines")


@pytest.fixture(scope="session")
def corpus():
    return folder_of("SOFTPROMPT_TEST_CORPUS", "a folder of text as JSON Lines")


@pytest.fixture(scope="session")
def fixtures():
    return folder_of("SOFTPROMPT_TEST_FIXTURES", "a folder with T5's vocabulary")
