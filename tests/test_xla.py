"""Options of XLA's compiler: which loops get them, and that a missing one is left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt import evaluation, xla

OPTION = "xla_cpu_experimental_ynn_fusion_type"
YNNPACK = "__ynn_fusion"


@pytest.mark.parametrize(
    "text, alone",
    [("flags\t\t: fpu avx2 fma\nflags\t\t: fpu avx2 fma\n", True),
     ("flags\t\t: fpu avx2 avx512f\n", False),
     ("flags\t\t: fpu sse2\n", False),
     ("Features\t: fp asimd\n", False),
     (None, False)],
)  # fmt: skip
def test_loops_of_float32_do_without_ynnpack_where_a_processor_has_avx2_alone(
    tmp_path, monkeypatch, text, alone
):
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    assert xla._avx2_alone(path) == alone
    monkeypatch.setattr(xla, "_avx2_alone", lambda: alone)
    assert xla.loop_options("float32", "cpu") == ({OPTION: ""} if alone else {})
    assert xla.loop_options(jnp.bfloat16, "cpu") == xla.loop_options("float32", "gpu") == {}


@pytest.fixture
def alone(monkeypatch):
    """A processor with AVX2 alone, whose products are YNNPACK's unless told otherwise."""
    monkeypatch.setattr(xla, "_avx2_alone", lambda: True)
    x = jnp.ones((16, 64))
    if YNNPACK not in jax.jit(lambda a, b: a @ b).lower(x, x.T).compile().as_text():
        pytest.skip("this build of XLA, or this device, has no products by YNNPACK")


def test_of_decoding_the_loop_alone_is_compiled_without_ynnpack(alone, tiny):
    predictor = evaluation.Predictor(tiny, 0, batch_size=4, decode_length=2)
    ids, numbers = np.full((4, 16), 9, np.int32), np.arange(4, dtype=np.int32)
    encoded = jax.eval_shape(predictor._encode, tiny.params, ids)
    programs = [
        predictor._encode.lower(tiny.params, ids),
        predictor._generate.lower(tiny.params, encoded, numbers),
        predictor._generate_scored.lower(tiny.params, encoded),
    ]
    found = [YNNPACK in program.compile().as_text() for program in programs]
    assert found == [True, False, False]


def test_an_option_is_left_out_where_xla_lacks_it_or_a_user_has_set_it(alone, monkeypatch):
    said = []
    monkeypatch.setattr(xla.logging, "warning", lambda text, *args: said.append(text % args))
    assert xla._known("xla_cpu_no_such_option", True) == {}
    assert len(said) == 1 and said[0].startswith("compiling without xla_cpu_no_such_option=True: ")
    xla._known.cache_clear()
    monkeypatch.setenv("XLA_FLAGS", f"--{OPTION}=INDIVIDUAL_DOT")
    assert xla.loop_options("float32", "cpu") == {}
    xla._known.cache_clear()
