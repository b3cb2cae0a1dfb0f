"""Compiling for devices that are not there: which there are, and what a dry run says of them."""

import importlib.util

import jax
import pytest
from test_memory import tiny_run

from softprompt import dry_run, memory, partition, products, topology, xla

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, TPU's compiler, is not installed: pip install libtpu",
)
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None
    and importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="JAX's CUDA plugin is not installed: pip install jax-cuda12-plugin jax-cuda12-pjrt",
)
DRY_RUN = [
    "train", "--gin_file=models/t5_1_1_embedded.gin", "--gin_file=runs/prompt_finetune.gin",
    "--gin.BATCH_SIZE=8", "--gin.TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 8}",
]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["", "v5e", "v5e:", "v5e:2", "v5e:0x2", "v5e:2x2x2", "v5litepod-8", "v9:2x2", "h100",
             "h100:0", "h100:2x4", "v4:-1x1x1", "V5E:2x4"]
)  # fmt: skip
def test_a_name_that_is_none_is_refused_with_examples(name):
    with pytest.raises(ValueError, match=f"--topology is '{name}', expected .* v5e:2x4, v6e"):
        topology.describe(name)


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--topology=v5e:2x4 needs .*: pip install libtpu"):
        topology.describe("v5e:2x4")

    def none(**options):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topology.topologies, "get_topology_desc", none)
    with pytest.raises(ValueError, match="--topology=h100:8 needs .* pip install jax-cuda12-plu"):
        topology.describe("h100:8")


def test_it_is_for_dry_runs(capsys):
    from softprompt.__main__ import main

    assert main([*DRY_RUN, "--topology=v5e:2x4"]) == 2
    assert "--topology is for --dry_run" in capsys.readouterr().err
    assert main([*DRY_RUN, "--topology=v5e:2", "--dry_run"]) == 2
    assert "--topology is 'v5e:2', expected a kind and its chips" in capsys.readouterr().err


def test_a_mesh_takes_the_devices_that_it_is_given():
    device = jax.devices()[0]
    assert partition.make_mesh(among=[device]).devices.tolist() == [[device]]
    with pytest.raises(ValueError, match="needs 2 devices, got 1"):
        partition.make_mesh(model=2, among=[device])


def test_options_and_products_are_those_of_the_platform_that_is_compiled_for():
    assert xla.step_options("tpu") == {}
    assert "xla_cpu_scheduler_type" in xla.step_options("cpu")
    assert xla.step_options() == xla.step_options(jax.default_backend())
    assert products.platform() == jax.default_backend()
    for device in ("tpu", jax.devices()[0]):
        with jax.default_device(device):
            assert products.platform() == getattr(device, "platform", device)


@pytest.mark.parametrize(
    "text, expected",
    [("E1000: Ran out of memory on HBM, the total memory required for HLO temporaries (40.50G) "
      "exceeds available HBM (15.75G).", 40.5 * 2**30),
     ("Ran out of memory in memory space hbm. Used 512.00M of 15.75G hbm.", 2**29),
     ("RESOURCE_EXHAUSTED", 0)],
)  # fmt: skip
def test_what_a_compiler_says_in_refusing_is_read(text, expected):
    assert memory.said_in_refusing(text) == expected


def refusing(text):
    """A `jax.stages.Lowered` that a compiler refuses."""

    class Lowered:
        def compile(self, compiler_options):
            raise jax.errors.JaxRuntimeError(text)

    return Lowered()


@pytest.mark.parametrize("said, peak", [("Used 3.00G of 1.00G hbm", 3 * 2**30), ("", None)])
def test_a_program_that_is_refused_does_not_fit(monkeypatch, said, peak):
    run, found = tiny_run(), memory.lower(tiny_run())
    monkeypatch.setattr(
        memory, "lower", lambda run: (refusing(f"RESOURCE_EXHAUSTED: {said}"), *found[1:])
    )
    needed = memory.need(run)
    assert needed.refused and needed.peak == (peak or needed.peak)
    assert not needed.fits(10 * needed.peak)
    assert "does not fit: the device's compiler refuses it" in dry_run.report(run, needed, 2**40)
    assert dry_run.suggest(run, needed, 2**40) == []
    monkeypatch.setattr(memory, "lower", lambda run: (refusing("INTERNAL: bug"), *found[1:]))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: bug"):
        memory.need(run)


@needs_libtpu
@pytest.mark.parametrize(
    "name, kind, count, gib",
    [("v5e:2x4", "TPU v5 lite", 8, 15), ("v4:2x2x1", "TPU v4", 4, 30), ("v6e:4x4", "TPU v6 lite",
     16, 31), ("v5p:1x1x1", "TPU v5", 1, 95)],
)  # fmt: skip
def test_a_device_is_a_chip_with_all_of_its_memory(name, kind, count, gib):
    devices, memory_size = topology.describe(name)
    assert {device.device_kind for device in devices} == {kind}
    assert len(devices) == count and memory_size // 2**30 == gib


@needs_libtpu
def test_a_slice_that_libtpu_does_not_know_is_refused_in_its_words():
    with pytest.raises(ValueError, match="--topology is 'v5e:3x3', .* libtpu says: .*divisible"):
        topology.describe("v5e:3x3")


@needs_libtpu
def test_a_tpus_compiler_says_what_a_run_needs_and_refuses_what_does_not_fit(capsys):
    from softprompt.__main__ import main

    flags = [*DRY_RUN, "--topology=v5e:2x4", "--gin.MODEL_PARTITIONS=2", "--dry_run"]
    assert main([*flags, "--device_memory=40MB"]) == 0
    said = capsys.readouterr().out
    assert "8 x TPU v5 lite (mesh {'data': 4, 'model': 2})" in said and "0.037" in said
    run = tiny_run(mesh=partition.make_mesh(among=topology.describe("v5e:1x1")[0]))
    needed = memory.need(run.but(rows=2**19, batch_size=0))
    assert needed.refused and needed.peak > 16 * 2**30


@needs_cuda
@pytest.mark.slow
def test_a_gpus_compiler_says_what_a_run_needs_without_a_gpu():
    devices, size = topology.describe("h100:2")
    mesh = partition.make_mesh(model=2, among=devices)
    needed = memory.need(tiny_run(mesh=mesh))
    assert len(devices) == 2 and needed.temporaries > 0 and needed.fits(size)
