"""Gin: every shipped file resolves; every mistake is one sentence."""

import itertools
import pathlib

import pytest

import gin
from softprompt import config, launch, train

MODELS = [f for f in config.shipped() if f.startswith("models/") and f != "models/t5.gin"]
PROMPTS = [f for f in config.shipped() if f.startswith("prompts/")]
TRAIN = {
    "MODEL_DIR": "/tmp/x",
    "MIXTURE_OR_TASK_NAME": "t",
    "INITIAL_CHECKPOINT_PATH": "embedded",
    "TASK_FEATURE_LENGTHS": "{'inputs': 64, 'targets': 8}",
    "CORPUS": "c",
    "VOCABULARY_FILE": "v",
    "PROMPT_FILE": "p",
    "PROMPT_FILES": "['p', 'q']",
    "POPULATION_DIR": "/tmp/x",
    "INPUT_FILE": "i",
    "OUTPUT_FILE": "o",
    "CLASS_LABELS": "['a', 'b']",
    "PROMPT_TEXT": "some text",
    "METHOD": "probe",
    "TRANSFER_DIR": "/tmp/x",
    "TRIAL_PROMPT": "t",
}
COMMANDS = {
    "runs/prompt_finetune.gin": "train",
    "runs/prompt_classify.gin": "train",
    "runs/model_finetune.gin": "train",
    "runs/baseline.gin": "baseline",
    "runs/transfer.gin": "train",
    "runs/transfer_paraphrase.gin": "train",
    "runs/pretrain.gin": "train",
    "runs/pretrain_small.gin": "train",
    "runs/lm_adapt.gin": "train",
    "runs/lm_adapt_small.gin": "train",
    "runs/prompt_eval.gin": "eval",
    "runs/prompt_infer.gin": "infer",
    "runs/mixed_infer.gin": "infer",
    "runs/prompt_ensemble.gin": "eval",
    "runs/population.gin": "train",
}


def parse(files, **bindings):
    """Parses, giving whatever the files require and these tests know."""
    try:
        config.parse(files, list(bindings.items()))
    except ValueError as error:
        if "required gin macros" not in str(error):
            raise
        named = str(error).split(": ")[1].split("; ")[0].split(", ")
        config.parse(files, [*((n, TRAIN[n]) for n in named), *bindings.items()])


def test_every_run_file_is_known_here():
    assert set(COMMANDS) == {f for f in config.shipped() if f.startswith("runs/")}


@pytest.mark.parametrize("model, run", list(itertools.product(MODELS, COMMANDS)))
def test_every_model_and_run_resolve(model, run):
    parse([model, run])
    bindings = gin.get_bindings(f"launch.{COMMANDS[run]}")
    assert bindings["task_feature_lengths"].keys() == {"inputs", "targets"}
    assert bindings.get("architecture", "t5") and callable(bindings["mesh"])
    assert config.macros()["ARCHITECTURE"] == pathlib.Path(model).stem


def test_what_all_models_share_takes_the_architecture_of_the_checkpoint():
    parse(["models/t5.gin", "runs/prompt_finetune.gin"])
    assert config.arguments(launch.train)["architecture"] is None


def test_a_run_without_a_backbones_file_says_what_lacks():
    given = [("MODEL_DIR", "run"), ("MIXTURE_OR_TASK_NAME", "wic"), ("DTYPE", "float32")]
    with pytest.raises(ValueError) as error:
        config.parse(["runs/prompt_finetune.gin"], given)
    assert str(error.value).startswith(
        "required gin macros have no value: ARCHITECTURE, DROPOUT_RATE, INITIAL_CHECKPOINT_PATH, "
        "TASK_FEATURE_LENGTHS, VOCABULARY_FILE; give a backbone's file, such as "
        "--gin_file=models/t5_1_1_embedded.gin, or --gin.ARCHITECTURE=… "
    )


@pytest.mark.parametrize("prompt_file", PROMPTS)
def test_every_initialiser_resolves(prompt_file):
    parse(["models/t5_1_1_embedded.gin", "runs/prompt_finetune.gin", prompt_file])
    init = gin.get_bindings("launch.train")["prompt_init"]
    assert callable(init)


def test_all_missing_macros_are_listed_at_once():
    with pytest.raises(ValueError) as error:
        config.parse(["models/t5_1_1_base.gin", "runs/prompt_finetune.gin"])
    for name in ("MODEL_DIR", "MIXTURE_OR_TASK_NAME", "INITIAL_CHECKPOINT_PATH"):
        assert f"--gin.{name}=…" in str(error.value)


def test_unknown_names_and_files_suggest_near_ones():
    with pytest.raises(ValueError, match="did you mean runs/prompt_finetune.gin"):
        config.parse(["runs/prompt_fintune.gin"])
    with pytest.raises(ValueError, match="the name 'TRAIN_STEP'; did you mean TRAIN_STEPS"):
        parse(["models/t5_1_1_embedded.gin", "runs/prompt_finetune.gin"], TRAIN_STEP="3")
    with pytest.raises(ValueError, match="no --gin_file given; shipped ones: models/"):
        config.parse([])


@pytest.mark.parametrize("folder", ["models", "runs", "prompts"])
def test_a_folder_of_a_shipped_ones_name_is_not_in_the_way(tmp_path, monkeypatch, folder):
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # As `python -m` does.
    files = ["models/t5_1_1_embedded.gin", "runs/baseline.gin", "prompts/from_random_uniform.gin"]
    config.parse(files, [("METHOD", "majority")], complete=False)
    assert config.macros()["METHOD"] == "majority"


def test_a_malformed_file_is_one_sentence(tmp_path):
    (tmp_path / "bad.gin").write_text("MODEL_DIR = = 3\n")
    with pytest.raises(ValueError, match="bad.gin") as error:
        config.parse([str(tmp_path / "bad.gin")])
    assert "\n" not in str(error.value)


def test_an_error_that_gin_decorated_is_still_the_one_it_was():
    @gin.configurable("raises_it")
    def raises_it(kind):
        raise kind("step 3")

    for kind in (train.Diverged, ValueError):
        with pytest.raises(ValueError, match="^step 3$") as found, config.errors():
            raises_it(kind)
        assert type(found.value) is kind


def test_bindings_of_a_module_are_told_by_their_values():
    files = ["models/t5_1_1_embedded.gin", "runs/prompt_classify.gin"]
    config.parse(files, [("LEARNING_RATE", "0.2")], complete=False)
    found = config.bindings("optim")
    assert found["warmup_linear.peak"] == 0.2 and found["warmup_linear.steps"] == 300
    assert found["adafactor.learning_rate"].startswith("@")


def test_a_text_may_begin_with_a_bracket():
    files = ["models/t5_1_1_embedded.gin", "runs/prompt_finetune.gin"]
    for text in ("{premise} so {hypothesis}", "[a] {text}", "{text}"):
        config.parse(files, [("TEXT_TEMPLATE", text)], complete=False)
        assert config.macros()["TEXT_TEMPLATE"] == text
    with pytest.raises(ValueError, match="--gin.TASK_FEATURE_LENGTHS={inputs}"):
        config.parse(files, [("TASK_FEATURE_LENGTHS", "{inputs}")], complete=False)


def test_pre_training_takes_the_dropout_it_is_given():
    files = ["models/t5_1_1_small.gin", "runs/pretrain.gin"]
    for given, rate in ((None, 0.0), ("0.1", 0.1)):
        config.parse(files, [("DROPOUT_RATE", given)] if given else [], complete=False)
        assert config.arguments(launch.train)["dropout_rate"] == rate


def test_search_paths_find_files(tmp_path):
    (tmp_path / "mine.gin").write_text("MINE = 3\n")
    config.parse(["mine.gin"], search_paths=[str(tmp_path)])
    assert config.macros() == {"MINE": 3}


@pytest.mark.parametrize(
    "flag, value",
    [("/tmp/run", "/tmp/run"), ("question: {text}", "question: {text}"), ("300", 300),
     ("{'inputs': 3}", {"inputs": 3}), ("('.*',)", (".*",)), ("None", None), ("1e-3", 1e-3)],
)  # fmt: skip
def test_bare_words_are_strings_and_the_rest_is_python(flag, value):
    gin.clear_config()
    gin.parse_config(f"X = {config.literal(flag)}")
    assert config.macros()["X"] == value


def test_the_operative_config_gives_the_same_run():
    parse(["models/t5_1_1_embedded.gin", "runs/prompt_finetune.gin"], TRAIN_STEPS="7")
    text, before = config.operative(), config.macros()
    gin.clear_config()
    gin.parse_config(text)
    assert config.macros() == before
    assert config.configured(launch.train) is not None
