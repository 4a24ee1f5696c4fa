"""Every mistake stops train_grpo.py before its first step, with one line that says what to change.

In one process, main() itself runs; two real runs under torchrun are at the end."""

import json
import re
import shutil
import sys
import traceback

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from ranks import ROOT, torchrun

import common
import policy
import train_grpo


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return tmp_path_factory.mktemp("caches")


@pytest.fixture
def refusal(start, tmp_path, caches, process_group, monkeypatch):
    """A function: the command line's arguments -> the one line that the run stops with.

    weights: whether they may have been read by then."""
    joined = (0, 1, torch.device("cpu"))  # a process joins one group only, and this one has
    monkeypatch.setattr(common, "start", lambda signals: joined)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", caches)
    monkeypatch.setenv("XDG_CACHE_HOME", str(caches))
    monkeypatch.chdir(ROOT)

    def begun(*_):
        pytest.fail("the mistake was not seen before the first step")

    monkeypatch.setattr(common, "finish_step", begun)
    monkeypatch.setattr(train_grpo, "collect", begun)

    def run(*extra, weights=False, **settings):
        def read(*_, **__):
            pytest.fail("the mistake was not seen before the weights were read")

        if not weights:
            monkeypatch.setattr(policy.AutoModelForImageTextToText, "from_pretrained", read)
        settings = {
            "model": start / "model",
            "train_data": start / "data",
            "val_data": f"{start}/data@val",
            "out_dir": tmp_path / "run",
            "steps": 2,
            **settings,
        }
        arguments = ["configs/tiny.py", *(f"--{k}={v}" for k, v in settings.items()), *extra]
        monkeypatch.setattr(sys, "argv", ["train_grpo.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            train_grpo.main()
        message = str(stop.value.code)
        assert message.startswith("error: ") and "\n" not in message.strip(), message
        return message

    return run


def assert_says(message, *parts):
    missing = [part for part in parts if str(part) not in message]
    assert not missing, f"{missing} not in: {message}"


def test_a_run_without_a_mistake_reaches_its_first_step(refusal):
    """What every other test here relies on: without its mistake, it would not stop."""
    with pytest.raises(pytest.fail.Exception, match="before the first step"):
        refusal(weights=True)


# --- settings -------------------------------------------------------------------------------------

UNKNOWN = {
    "loss": ("ppo", "'grpo', 'gspo', 'cispo'"),
    "loss_mean": ("tokens", "'token', 'sequence'"),
    "engine": ("vlm", "'vllm', 'torch'"),
    "dtype": ("float16", "'bfloat16', 'float32'"),
    "log": ("wandbb", "'', 'wandb'"),
    "judge": ("gpt", "'http', 'exact'"),
    "embedder": ("bert", "name ngram"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_choice(refusal, name):
    value, choices = UNKNOWN[name]
    assert_says(refusal(**{name: value}), f"{name}='{value}'", choices)


WRONG = [
    ({"model": ""}, ["model=''", "model and train_data and val_data"]),
    ({"train_data": ""}, ["train_data=''"]),
    ({"val_data": ""}, ["val_data=''"]),
    ({"group_size": 1}, ["group_size=1", "group_size > 1"]),
    ({"prompts_per_step": 6, "updates_per_step": 4},
     ["prompts_per_step=6", "updates_per_step=4", "prompts_per_step % updates_per_step == 0"]),
    ({"tokens_per_micro_batch": 1000, "max_prompt_tokens": 1024, "max_response_tokens": 48},
     ["tokens_per_micro_batch=1000", "max_prompt_tokens=1024", "max_response_tokens=48",
      "tokens_per_micro_batch >= max_prompt_tokens + max_response_tokens"]),
    ({"prompts_per_step": 0}, ["prompts_per_step=0", "prompts_per_step >= ranks"]),
    ({"updates_per_step": 0}, ["updates_per_step=0", "updates_per_step > 0"]),
    ({"temperature": 0}, ["temperature=0.0", "temperature > 0"]),
    ({"learning_rate": 0}, ["learning_rate=0.0", "learning_rate > 0"]),
    ({"validate_every": 0}, ["validate_every=0", "validate_every > 0"]),
    ({"save_every": 0}, ["save_every=0", "save_every > 0"]),
    ({"steps": 0, "epochs": 0}, ["steps=0, epochs=0", "steps + epochs > 0"]),
    ({"weight_judge": 0.9}, ["weight_*", "[0.9, ", "three add up to 1"]),
    ({"embed_threshold": 1.5}, ["embed_threshold=1.5", "embed_threshold <= 1"]),
    ({"prompt_template": "configs/nowhere.txt"},
     ["prompt_template 'configs/nowhere.txt'", "path", "{question}"]),
    ({"prompt_template": "Answer this!"}, ["prompt_template 'Answer this!'", "{question}"]),
    ({"prompt_template": "{question} {question}"}, ["prompt_template", "{question}", "found 2"]),
]


@pytest.mark.parametrize("settings, parts", WRONG, ids=lambda x: ",".join(x))
def test_settings_that_cannot_work(refusal, settings, parts):
    assert_says(refusal(**settings), *parts)


@pytest.mark.parametrize(
    "name, value",
    [("steps", -1), ("seed", -1), ("kl_coef", -0.1), ("val_temperature", -1.0), ("val_prompts", -1),
     ("max_grad_norm", -1.0)],
)
def test_below_zero(refusal, name, value):
    assert_says(refusal(**{name: value}), f"{name}={value}", "0")


def test_fewer_prompts_than_ranks(refusal, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert_says(refusal(prompts_per_step=4), "prompts_per_step=4", "ranks=8")
    cfg = common.load_config(train_grpo.defaults, [
        "configs/tiny.py", "--model=m", "--train_data=t", "--val_data=v", "--prompts_per_step=8"])
    common.check(cfg, 8)
    with pytest.raises(ValueError, match="ranks=9"):
        common.check(cfg, 9)


def test_engine_args_without_vllm(refusal):
    message = refusal(engine_args="{'max_num_seqs': 4}")
    assert_says(message, "engine_args={'max_num_seqs': 4}", "engine == 'vllm'")


def test_vllm_that_is_not_installed(refusal, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert_says(refusal(engine="vllm", weights=True), "vllm", "install it, or change")


def test_tensor_parallel(refusal, monkeypatch):
    assert_says(refusal(tensor_parallel=0), "tensor_parallel=0", "tensor_parallel > 0")
    message = refusal(tensor_parallel=2, engine="vllm")
    assert_says(message, "tensor_parallel=2", "ranks=1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_says(refusal(tensor_parallel=2), "tensor_parallel=2", "engine == 'vllm'")


def test_a_dashboard_that_is_not_installed(refusal, monkeypatch):
    package = "wandb"

    class Absent:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.split(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in [n for n in sys.modules if package in n.split(".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent, *sys.meta_path])
    assert_says(refusal(log=package), f"'{package}'")


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError) as error:
        common.start()
    assert str(error.value) == "2 ranks, 1 GPUs: run torchrun with --nproc_per_node 1"


# --- their names and types ------------------------------------------------------------------------

TYPES = [("seed", "'one'", "int", "str"), ("seed", "True", "int", "bool"),
         ("seed", "1.5", "int", "float"), ("kl_coef", "'small'", "float", "str"),
         ("accept_changes", "1", "bool", "int"), ("engine_args", "[1]", "dict", "list")]


@pytest.mark.parametrize("name, value, want, got", TYPES)
def test_value_of_another_type(refusal, tmp_path, name, value, want, got):
    message = refusal(**{name: value})
    assert_says(message, f"--{name}=", f"{name} must be of type {want}", f"not {got}")
    config = tmp_path / "mine.py"
    config.write_text(f"{name} = {value}\n")
    assert_says(refusal(config), config, f"{name} must be of type {want}", f"not {got}")


def test_text_where_a_setting_takes_text_only(refusal, tmp_path):
    (tmp_path / "mine.py").write_text("loss = 3\n")
    assert_says(refusal(tmp_path / "mine.py"), "mine.py: loss must be of type str", "not int 3")


def test_misspelt_setting(refusal, tmp_path):
    assert_says(refusal("--group_sise=4"), "--group_sise=4", "'group_sise'", "'group_size'")
    (tmp_path / "mine.py").write_text("learning_rat = 1e-5\n")
    assert_says(refusal(tmp_path / "mine.py"), "mine.py", "'learning_rat'", "'learning_rate'")


def test_config_file(refusal, tmp_path):
    assert_says(refusal("configs/tyni.py"), "configs/tyni.py", "No such file")


@pytest.mark.parametrize(
    "text, part", [("loss = 'grpo", "unterminated"), ("accept_changes = true", "'true'")])
def test_config_file_that_is_no_python(refusal, tmp_path, text, part):
    """Python's own words: they point at the line."""
    (tmp_path / "mine.py").write_text(f"seed = 1\n{text}\n")
    with pytest.raises((SyntaxError, NameError)) as error:
        refusal(tmp_path / "mine.py")
    assert_says("".join(traceback.format_exception(error.value)), "mine.py\", line 2", part)


# --- the model ------------------------------------------------------------------------------------


@pytest.fixture
def model(start, tmp_path):
    return shutil.copytree(start / "model", tmp_path / "model")


@pytest.mark.parametrize("name", ["/nowhere/model", "nowhere", "configs/model"])
def test_no_such_model(refusal, name):
    assert_says(refusal(model=name), name, "does not exist", "correct the path")


def test_no_such_model_on_the_hub(refusal):
    """The tests are offline; a name that nobody took fails in the same place."""
    assert_says(refusal(model="nobody/no-such-model"), "model nobody/no-such-model", "hub id")


FILES = {
    "tokenizer.json": "copy",
    "config.json": "config.json",
    "preprocessor_config.json": "preprocessor_config.json",
    "chat_template.jinja": "chat template",
    "generation_config.json": "does not appear to have a file named",
    "model.safetensors": "model.safetensors",
}


@pytest.mark.parametrize("file", FILES)
def test_incomplete_model(refusal, model, file):
    (model / file).unlink()
    late = file in ("generation_config.json", "model.safetensors")
    needed = {"chat_template.jinja": "chat template"}.get(file, file)
    assert_says(refusal(model=model, weights=late), model, needed, FILES[file])


@pytest.mark.parametrize("kind", ["qwen3", "qwen2_vl", "glm4v", "nobodys"])
def test_unsupported_architecture(refusal, model, kind):
    config = json.loads((model / "config.json").read_text()) | {"model_type": kind}
    (model / "config.json").write_text(json.dumps(config))
    message = refusal(model=model)
    assert_says(message, model)
    assert re.search("qwen2_5_vl|Qwen-VL", message), "what would be supported"


def test_a_text_model(refusal, model):
    """The real thing: no vision part at all."""
    config = json.loads((model / "config.json").read_text())
    text = config["text_config"] | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    (model / "config.json").write_text(json.dumps(text))
    assert_says(refusal(model=model), model, "Qwen-VL")


# --- the data -------------------------------------------------------------------------------------


def table(start, path, change=lambda i, row: row):
    source = start / "data/train.parquet"
    rows = [change(i, row) for i, row in enumerate(pq.read_table(source).to_pylist())]
    pq.write_table(type(pq.read_table(source)).from_pylist(rows), path)
    return path


@pytest.mark.parametrize("setting", ["train_data", "val_data"])
@pytest.mark.parametrize("path", ["/nowhere/rows.parquet", "configs/rows.jsonl", "nowhere"])
def test_no_such_data(refusal, setting, path):
    assert_says(refusal(**{setting: path}), path, "does not exist", "correct the path")


@pytest.mark.parametrize("setting", ["train_data", "val_data"])
def test_no_such_split_lists_those_there(refusal, start, setting):
    message = refusal(**{setting: f"{start}/data@test"})
    assert_says(message, f"{start}/data@test", "'test': 0 files", "train.parquet", "val.parquet")


def test_missing_column(refusal, start, tmp_path):
    path = table(start, tmp_path / "rows.parquet",
                 lambda i, row: {"question": row["problem"], "solution": row["solution"]})
    message = refusal(train_data=path)
    assert_says(message, path, "problem and solution", "columns question, solution")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_empty_data(refusal, start, tmp_path, name):
    (tmp_path / "rows.jsonl").write_text("")
    pq.write_table(pq.read_table(start / "data/train.parquet").slice(0, 0),
                   tmp_path / "rows.parquet")
    message = refusal(val_data=tmp_path / name)
    assert_says(message, tmp_path / name)
    why = message.replace(str(tmp_path), "")
    assert re.search(r"empty|\b(0|no) rows", why), message


def test_broken_file(refusal, tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and no more")
    assert_says(refusal(train_data=tmp_path / "rows.parquet"), tmp_path / "rows.parquet", "corrupt")
    (tmp_path / "rows.jsonl").write_text('{"problem": "Which side?"\n{"solution"')
    assert_says(refusal(train_data=tmp_path / "rows.jsonl"), tmp_path / "rows.jsonl", "JSON")


def test_too_many_bad_rows(refusal, start, tmp_path):
    def harm(i, row):
        if i == 3:
            row["solution"] = "no tag"
        if i == 7:
            row["image"][0]["bytes"] = b"no picture"
        if i == 9:
            row["problem"] = " "
        return row

    path = table(start, tmp_path / "rows.parquet", harm)
    message = refusal(train_data=path, max_bad_rows=0.02)
    assert_says(message, path, "3 of 64 rows are bad", "max_bad_rows=0.02", "row 3, solution",
          "row 7, image", "row 9, problem")


def test_all_prompts_too_long(refusal, start):
    message = refusal(train_data=start / "data", max_prompt_tokens=4)
    assert_says(message, start / "data", "64 are longer than", "max_prompt_tokens=4", "raise")


# --- a folder that holds another run --------------------------------------------------------------


def test_out_dir_of_a_run_with_another_seed(refusal, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints/step_000002").mkdir(parents=True)
    (run / "checkpoints/latest").symlink_to("step_000002")
    (run / "checkpoints/step_000002/manifest.json").write_text("{}")
    (run / "config.json").write_text(json.dumps({"seed": 7, "changes": []}))
    (run / "metrics.jsonl").write_text('{"step": 2}\n{"step": 3}\n')
    message = refusal(seed=1)
    assert_says(message, run, "seed was 7 and is 1", "another out_dir")
    assert (run / "metrics.jsonl").read_text() == '{"step": 2}\n{"step": 3}\n', "it was touched"


# --- under torchrun -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mistake, parts",
    [("--group_sise=4", ["'group_sise'", "'group_size'"]),
     ("--model=/nowhere/model", ["/nowhere/model", "does not exist"])],
)
def test_two_ranks_say_it_once(start, tmp_path, mistake, parts):
    """The second is met after the process group is up. torchrun itself adds a traceback of its own,
    about a rank that failed; ours must not be in it."""
    run = torchrun(
        2, "train_grpo.py", "configs/tiny.py", f"--model={start}/model",
        f"--train_data={start}/data", f"--val_data={start}/data@val",
        f"--out_dir={tmp_path}/run", "--steps=1", mistake, check=False, timeout=200)
    assert run.returncode
    said = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, run.stderr
    assert_says(said[0], *parts)
    assert f'File "{ROOT}/' not in run.stderr.replace(f'File "{ROOT}/.venv', ""), run.stderr
    assert "Traceback" not in run.stderr.split("error: ")[0], run.stderr
    assert not (tmp_path / "run/metrics.jsonl").exists()
