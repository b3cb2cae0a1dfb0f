"""Options of XLA's compiler: what programs of a kind are told on a CPU, and nowhere else."""

import functools
import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

Options = dict[str, Any]


def step_options(platform: str | None = None) -> Options:
    """For a train step on `platform` (default: JAX's): its schedule must save memory.

    XLA's CPU backend orders operations for concurrency unless told otherwise, and begins what the
    backward pass recomputes, and the wider copies of int8 weights, long before they are needed.
    """
    if (platform or jax.default_backend()) != "cpu":
        return {}
    return _known("xla_cpu_scheduler_type", "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED")


def loop_options(dtype: Any, platform: str | None = None) -> Options:
    """For a loop that multiplies a few rows of `dtype` by all weights, token by token.

    Without AVX512 the kernels of YNNPACK read a matrix of float32 in pieces of 64 bytes that lie a
    row apart, again for every six rows; Eigen packs it first. Of bfloat16 matrices XLA would make
    float32 copies for Eigen, and keep them through the loop.
    """
    on_cpu = (platform or jax.default_backend()) == "cpu"
    if not on_cpu or jnp.dtype(dtype) != jnp.float32 or not _avx2_alone():
        return {}
    return _known("xla_cpu_experimental_ynn_fusion_type", "")


@functools.cache
def _avx2_alone(cpuinfo: pathlib.Path = pathlib.Path("/proc/cpuinfo")) -> bool:
    """Whether this is a processor with AVX2 and without AVX512 (where it is not said: no)."""
    if not cpuinfo.exists():
        return False
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
    found = flags[1].split() if flags else []
    return "avx2" in found and "avx512f" not in found


@functools.cache
def _known(name: str, value: Any) -> Options:
    """The option, unless XLA_FLAGS has it or this version of XLA has not (a warning says so)."""
    if name in os.environ.get("XLA_FLAGS", ""):
        return {}
    try:
        jax.jit(lambda: 0.0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        logging.warning("compiling without %s=%r: %s", name, value, error)
        return {}
    return {name: value}
