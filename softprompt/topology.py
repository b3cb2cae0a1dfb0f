"""Devices that are not there, to compile for.

TPUs come from the package `libtpu`, NVIDIA GPUs from JAX's CUDA plugin; neither looks for hardware.
"""

import importlib.util
import os
import re

import jax
from jax.experimental import topologies

EXAMPLES = "v5e:2x4, v6e:4x4, v5p:2x2x1, v4:2x2x1 or h100:8"
# What a program may take of a chip's memory, in GiB, as libtpu's compiler says when it refuses one,
# and the chip's dimensions. The two cores of a v4 or v5p chip are one device.
TPUS = {"v4": (30.75, 3), "v5e": (15.75, 2), "v5p": (95.73, 3), "v6e": (31.24, 2)}
# As XLA describes it: what its compiler asks of a device that is there.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# Of 79 GiB JAX takes three quarters, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
H100_MEMORY = 84942979072 * 3 // 4


def describe(name: str) -> tuple[list[jax.Device], int]:
    """The devices of `name`, to compile for alone, and the bytes that a program may take of each.

    Where JAX has not been told which platforms to use, nor looked at any, it is told the CPU.

    Args:
      name: a TPU slice such as 'v5e:2x4' (chips along each dimension), or 'h100:8' (GPUs of one
        host).

    Raises:
      ValueError: no such name, or what it needs is not installed.
    """
    kind, _, shape = name.partition(":")
    sides = (
        [int(n) for n in shape.split("x")] if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) else []
    )
    if len(sides) != {"h100": 1}.get(kind, TPUS.get(kind, (0, -1))[1]):
        raise ValueError(f"--topology is {name!r}, expected a kind and its chips: {EXAMPLES}")
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")
    return _gpus(sides[0]) if kind == "h100" else _tpus(name, kind)


def _tpus(name: str, kind: str) -> tuple[list[jax.Device], int]:
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"--topology={name} needs TPU's compiler: pip install libtpu")
    # No TPU is used: nothing is asked of the machine it would be on, and none is kept from others.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    # What libtpu else complains of; the topology's name counts.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    cores = {"chip_config_name": "megacore"} if kind == "v4" else {}
    try:
        found = topologies.get_topology_desc(topology_name=name, platform="tpu", **cores).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"--topology is {name!r}, expected such as {EXAMPLES}; libtpu says: {_first(error)}"
        ) from None
    return found, int(TPUS[kind][0] * 2**30)


def _gpus(count: int) -> tuple[list[jax.Device], int]:
    name = f"h100:{count}"
    try:
        found = topologies.get_topology_desc(
            platform="cuda", target_config=H100, topology=f"1x1x{count}"
        ).devices
    except NotImplementedError:
        raise ValueError(
            f"--topology={name} needs the CUDA plugin of this JAX: "
            f"pip install jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}"
        ) from None
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--topology={name}: the CUDA plugin says: {_first(error)}") from None
    return found, H100_MEMORY


def _first(error: Exception) -> str:
    return str(error).splitlines()[0]
