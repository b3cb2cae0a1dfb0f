"""Options of XLA's compiler: which loops get them, and that a missing one is left out."""

import jax
import pytest

from softprompt import xla

PRODUCTS_BY_EIGEN = {"xla_cpu_experimental_ynn_fusion_type": ""}


@pytest.mark.parametrize(
    "text, loops",
    [("flags\t\t: fpu avx2 fma\nflags\t\t: fpu avx2 fma\n", True),
     ("flags\t\t: fpu avx2 avx512f\n", False),
     ("flags\t\t: fpu sse2\n", False),
     ("Features\t: fp asimd\n", False),
     (None, False)],
)  # fmt: skip
def test_loops_do_without_ynnpack_where_a_processor_has_avx2_alone(
    tmp_path, monkeypatch, text, loops
):
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    assert xla._avx2_alone(path) == loops
    monkeypatch.setattr(xla, "_avx2_alone", lambda: loops)
    assert xla.loop_options("cpu") == (PRODUCTS_BY_EIGEN if loops else {})
    assert xla.loop_options("gpu") == {}


def test_a_loops_options_take_its_products_from_ynnpack(monkeypatch):
    monkeypatch.setattr(xla, "_avx2_alone", lambda: True)
    x = jax.numpy.ones((16, 64))
    compiled = [
        jax.jit(lambda x, y: x @ y, compiler_options=options).lower(x, x.T).compile().as_text()
        for options in ({}, xla.loop_options("cpu"))
    ]
    assert ["__ynn_fusion" in text for text in compiled] == [True, False]


def test_an_option_that_xla_does_not_have_is_left_out():
    assert xla._known("xla_cpu_no_such_option", True) == {}
    assert xla._known("xla_cpu_use_xnnpack", False) == {"xla_cpu_use_xnnpack": False}
