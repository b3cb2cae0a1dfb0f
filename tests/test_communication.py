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


def test_bytes_are_those_of_all_results():
    text = """
  %a = (f32[100,16]{1,0}, f32[]) all-reduce(%x, %y), replica_groups=[1,8]<=[8], to_apply=%add
  %b = f32[4,8]{1,0} all-reduce(%z), replica_groups=[1,8]<=[8], to_apply=%add.clone_promoted
  %c = f32[2]{0} add(%d, %e)"""
    summed, promoted = communication.collectives(text, 8)
    assert (summed.kind, summed.axis, summed.bytes) == ("all-reduce", "model", 4 * 1601)
    assert (promoted.dtypes, promoted.bytes) == ("bf16", 2 * 32)


def run(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, str(PATH), "--size=t5_1_1_small", "--layers=1", *arguments],
        capture_output=True, text=True, check=True, timeout=600,
    ).stdout  # fmt: skip


@pytest.mark.slow
def test_data_parallel_devices_exchange_the_prompts_gradient_and_scalars_alone():
    said = run("--devices=8", "--model=1")
    # The gradient [100, 512], the sum of the loss and the number of tokens.
    assert f"data: {4 * (100 * 512 + 2):,} bytes" in said
    assert set(re.findall(communication.KINDS, said)) == {"all-reduce"}


@pytest.mark.slow
def test_model_parallel_devices_gather_neither_weights_nor_logits():
    said = run("--devices=4", "--model=2", "--inputs=28", "--targets=8")
    assert set(re.findall(communication.KINDS, said)) == {"all-reduce"}
    sizes = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) bytes\n", said)]
    # Activations [4 rows, 128, 512] in bfloat16 (two may share a collective, and a few scalars).
    assert max(sizes[: said.count(" x ")]) < 4 * 128 * 512 * 2 * 3 + 1e5
