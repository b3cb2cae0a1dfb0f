"""What devices send each other in a train step, counted from the compiled program."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

PATH = pathlib.Path(__file__).parent.parent / "benchmarks" / "communication.py"
_spec = importlib.util.spec_from_file_location("communication", PATH)
communication = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(communication)


@pytest.mark.parametrize(
    "groups, expected",
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", "model"),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", "data"),
        ("replica_groups=[2,4]<=[8]", "model"),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", "data"),
        ("replica_groups={}", "all"),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_2'}", "model"),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", "model"),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", "data"),
    ],
)
def test_groups_of_devices_are_told_by_their_axis(groups, expected):
    assert communication.axis(f"x = f32[] all-reduce(y), {groups}, to_apply=%add", 4) == expected


def test_bytes_are_those_of_every_result():
    text = """
  %a = (f32[100,16]{1,0}, f32[]) all-reduce(%x, %y), replica_groups=[1,8]<=[8], to_apply=%add
  %b = f32[4,8]{1,0} all-reduce(%z), replica_groups=[1,8]<=[8], to_apply=%add.clone_promoted
  %c = f32[2]{0} add(%d, %e)"""
    found = communication.collectives(text, 8)
    assert [(x.axis, x.dtype, x.bytes) for x in found] == [
        ("model", "f32", 6400), ("model", "f32", 4), ("model", "bf16", 64)
    ]  # fmt: skip
    assert communication.count(found)["model", "all-reduce", "f32"].tolist() == [2, 6404]


@pytest.fixture(scope="module", params=[0.0, 0.1])
def said(request):
    """What the command prints for T5 1.1 small on 8 devices, data-parallel and 4 x 2."""
    flags = ["--size=t5_1_1_small", "--devices=8", f"--dropout_rate={request.param}"]
    return subprocess.run(
        [sys.executable, str(PATH), *flags, "--model", "1", "2"],
        capture_output=True, text=True, check=True, timeout=900,
    ).stdout  # fmt: skip


@pytest.mark.slow
def test_over_the_data_axis_go_the_prompts_gradient_and_two_scalars_alone(said):
    # The gradient [100, 512], the sum of the loss and the number of tokens.
    expected = f"data       3 x all-reduce     f32           {4 * (100 * 512 + 2):,} bytes"
    assert [line.split() for line in said.splitlines() if line.startswith("  data")] == [
        expected.split(), expected.split()
    ]  # fmt: skip


@pytest.mark.slow
def test_over_the_model_axis_go_activations_and_neither_weights_nor_logits(said):
    assert set(re.findall(communication.KINDS, said)) == {"all-reduce"}
    lines = {x.split()[4]: x.split() for x in said.splitlines() if x.startswith("  model")}
    assert set(lines) == {"bf16", "f32"}
    # 8 rows of a shard: in float32 little more than the softmax's maximum and sum, [8, 8].
    assert int(lines["f32"][5].replace(",", "")) <= 4 * 8 * 8 * 4
    # Encoder activations [8, 356, 512]: the embedding's, and of each of 8 layers two forward, five
    # backward, and two of the decoder's cross-attention; the others are the decoder's [8, 8, 512].
    encoder, decoder = 8 * 356 * 512 * 2, 8 * 8 * 512 * 2
    total = int(lines["bf16"][5].replace(",", ""))
    assert (8 * 9 + 1) * encoder < total < (8 * 9 + 1) * encoder + 80 * decoder
