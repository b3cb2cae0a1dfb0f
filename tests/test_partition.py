"""One device and eight virtual ones train the same prompt, whichever way the mesh is cut."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import TINY

from softprompt import backbone as backbones
from softprompt import partition

RUN = """
import sys, numpy as np
sys.path.insert(0, sys.argv[1])
import jax
from conftest import TINY
from test_train import fit
from softprompt import backbone as backbones, evaluation, data, memory, partition, train, tree
from softprompt.formats import native
from softprompt.formats.stored import Stored
from softprompt.vocabulary import Vocabulary
words = Vocabulary(native.EMBEDDED / native.VOCABULARY_FILE)
pairs = [(f"number {i} of the lot", "odd" if i % 2 else "even") for i in range(16)]
found = {}
for shape in ((1, 1), (8, 1), (4, 2), (2, 4)):
    mesh = partition.make_mesh(*shape, devices=shape[0] * shape[1])
    if not found:
        native.save(sys.argv[3], Stored.of("tiny", TINY, backbones.random(TINY, 0).params, words))
    backbone = backbones.load(sys.argv[3], dropout_rate=0.1, mesh=mesh)
    held = {}
    for path, x in backbone.params.items():
        # One copy for all devices that hold the same.
        for shard in x.addressable_shards:
            held[path, shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    assert sum(held.values()) == sum(x.nbytes for x in backbone.params.values()), shape
    assert memory.shared_size(backbone.params, mesh) == -(-sum(held.values()) // mesh.size)
    kernel = backbone.params["encoder/layers_0/mlp/wi_0/kernel"]
    assert kernel.addressable_shards[0].data.shape == (24, 40 // shape[1])
    before = tree.fingerprint(backbone.params)
    # A program that may reuse its arguments takes memory of its own.
    scale = backbone.params["encoder/encoder_norm/scale"]
    again = jax.device_put(np.asarray(scale), scale.sharding)
    first = scale.addressable_shards[0].data.unsafe_buffer_pointer()
    assert again.addressable_shards[-1].data.unsafe_buffer_pointer() == first
    jax.jit(lambda x: 0 * x, donate_argnums=0)(again).block_until_ready()
    from test_train import batches_of
    result = fit(backbone, pairs, 5, batches=batches_of(backbone, pairs, 5, batch_size=8))
    assert tree.fingerprint(backbone.params) == before
    flat = {**backbone.params, train.PROMPT: result.trained[train.PROMPT]}
    examples = data.from_pairs(pairs, words, {"inputs": 16, "targets": 8})
    scores = evaluation.Predictor(backbone, 5, "rank", 8).score(flat, examples, ["odd", "even"])
    texts = evaluation.Predictor(backbone, 5, "generate", 8, 4).generate(flat, examples)
    sampler = evaluation.Predictor(backbone, 5, "generate", 8, 4, temperature=1.0)
    texts += sampler.generate(flat, examples)
    found["x".join(map(str, shape))] = result.trained[train.PROMPT]
    found["scores" + "x".join(map(str, shape))] = scores
    print(tree.fingerprint(backbone.params), texts)
np.savez(sys.argv[2], **found)
"""


@pytest.mark.slow
def test_eight_devices_train_what_one_does(tmp_path):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    here, out = str(pathlib.Path(__file__).parent), str(tmp_path / "found.npz")
    folder = str(tmp_path / "backbone")
    run = subprocess.run(
        [sys.executable, "-c", RUN, here, out, folder],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr
    said = run.stdout.splitlines()
    # Every mesh starts from the same weights and generates the same texts.
    assert len({line for line in said if not line.startswith("step")}) == 1
    found = np.load(out)
    for shape in ("8x1", "4x2", "2x4"):
        np.testing.assert_allclose(found[shape], found["1x1"], atol=2e-4)
        np.testing.assert_allclose(found["scores" + shape], found["scores1x1"], atol=1e-3)


def test_an_axis_that_the_mesh_does_not_divide_is_named():
    variables = backbones.abstract(dataclasses.replace(TINY, mlp_dim=41))
    mesh = jax.sharding.AbstractMesh((1, 2), ("data", "model"))
    with pytest.raises(ValueError, match="'mlp' has 41 entries, which 2 devices"):
        partition.shardings(variables, mesh)


def test_a_mesh_larger_than_the_machine_is_refused():
    count = len(jax.devices())
    with pytest.raises(ValueError, match=f"needs {3 * count} devices, got {count}"):
        partition.make_mesh(3, count)
    with pytest.raises(ValueError, match=f"x {3 * count} .model. needs {3 * count} devices, got"):
        partition.make_mesh(model=3 * count)


@pytest.mark.parametrize("value", [None, {}, "abc", True, 0, -2, 1.0])
def test_what_is_no_number_of_devices_is_refused(value):
    for arguments, name in (((value, 1), "DATA"), ((-1, value), "MODEL")):
        with pytest.raises(ValueError, match=f"{name}_PARTITIONS is .*, expected a number of dev"):
            partition.make_mesh(*arguments)


def test_a_logical_axis_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match=r"no sharding rule for the logical axes \['width'\]"):
        partition.spec(("embed", "width"))
