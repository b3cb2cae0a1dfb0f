"""The wheel carries everything, and works outside the repository."""

import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent


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
