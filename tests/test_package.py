"""The wheel carries everything and works outside the repository; layers are those of the design."""

import ast
import pathlib
import re
import subprocess
import sys
import zipfile

import pytest

import softprompt

ROOT = pathlib.Path(__file__).parent.parent


def test_a_module_imports_none_of_a_higher_layer():
    """By the table of docs/design.md, which names every module; functions may import later."""
    layers = re.findall(
        r"^\| (?:commands|runs|parts|ground) \| (.*) \|$",
        (ROOT / "docs/design.md").read_text(),
        re.M,
    )
    height = {name: -i for i, row in enumerate(layers) for name in re.findall(r"`(\w+)/?`", row)}
    files = {path.stem: path for path in (ROOT / "softprompt").glob("*.py")}
    assert len(layers) == 4 and set(files) - {"__init__"} == set(height) - {"formats"}
    upward = []
    for name in height.keys() & files.keys():
        for node in ast.parse(files[name].read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "softprompt":
                inner = node.module.split(".")[1:2] or [alias.name for alias in node.names]
                upward += [(name, x) for x in inner if height.get(x, -9) > height[name]]
    assert upward == []


def test_help_needs_no_jax_and_every_public_name_is_there():
    code = "import sys; from softprompt.__main__ import main\n"
    code += "try: main(['--help'])\nfinally: assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    for name in softprompt.__all__:
        assert getattr(softprompt, name).__module__.startswith("softprompt.")
    with pytest.raises(AttributeError, match="'softprompt' has no attribute 'tuned'"):
        _ = softprompt.tuned


@pytest.mark.slow
def test_the_wheel_works_outside_the_repository(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)],
        check=True,
    )
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for part in (
        "softprompt/gin/runs/prompt_finetune.gin",
        "softprompt/tasks/super_glue.py",
        "softprompt/formats/t5x.py",
        "softprompt/embedded/backbone/model.safetensors",
        "softprompt/embedded/data/entailment/train.jsonl",
    ):
        assert part in names
    assert not any(name.startswith(("tests/", "gin/", "tasks/")) for name in names)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import softprompt, softprompt.config as c, softprompt.tasks.records as r;"
        f"assert softprompt.__file__.startswith({str(tmp_path)!r});"
        "assert 'runs/pretrain.gin' in c.shipped();"
        "assert len(softprompt.embedded_data('sentiment').train) >= 300;"
        "print(softprompt.load_backbone().name)"
    )
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, 'site'); {code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "t5_1_1_embedded", run.stderr
