"""common.py: settings, sums over ranks, the files of a run."""

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import ROOT

import common
import train_grpo

DEFAULTS = dict(name="a", count=1, rate=0.5, flag=False, args={})


def load(*argv):
    return vars(common.load_config(DEFAULTS, [str(arg) for arg in argv]))


# --- load_config ----------------------------------------------------------------------------------


def test_without_arguments_the_defaults_come_as_a_copy():
    assert load() == DEFAULTS
    load("--count=5")
    assert DEFAULTS["count"] == 1, "the defaults were changed"


def test_the_last_one_wins(tmp_path):
    """Files and --key=value are read in the order in which they are given."""
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text('count, rate = 2, 0.25\nname = "one"\n')
    two.write_text("count = 3\n")
    assert load(one) == DEFAULTS | {"count": 2, "rate": 0.25, "name": "one"}
    assert load(one, two)["count"] == 3 and load(two, one)["count"] == 2
    assert load(one, two)["name"] == "one"
    assert load(one, "--count=4")["count"] == 4 and load("--count=4", one)["count"] == 2
    assert load("--count=4", "--count=5")["count"] == 5


def test_values_of_the_command_line():
    assert load("--count=-3")["count"] == -3
    assert load("--flag=True")["flag"] is True
    assert load("--args={'a': [1, 2.5], 'b': None}")["args"] == {"a": [1, 2.5], "b": None}
    assert load("--rate=1e-6")["rate"] == 1e-6
    for text in ("x", "3", "True", "None", "a=b", "--x", "", " 'quoted' ", "{question}\nNow."):
        assert load(f"--name={text}")["name"] == text, "a text is taken as it is"


def test_an_int_will_do_for_a_float(tmp_path):
    (tmp_path / "one.py").write_text("rate = 2\n")
    for value in (load("--rate=2")["rate"], load(tmp_path / "one.py")["rate"]):
        assert value == 2.0 and type(value) is float
    assert type(load("--count=2")["count"]) is int


@pytest.mark.parametrize(
    "arg",
    ["--count=1.0", "--count=True", "--count=x", "--count", "--flag=1", "--flag", "--flag=true",
     "--rate=True", "--rate=nan", "--args=[]", "--rate=", "--args={1}"],
)
def test_another_type_is_refused(arg):
    with pytest.raises(ValueError, match=r"must be of type \w+, like .*, not \w+"):
        load(arg)


def test_names_with_an_underscore_are_private_to_a_file(tmp_path):
    """So are the ones that Python itself adds, such as __name__; on the command line none is."""
    (tmp_path / "one.py").write_text('"""Text."""\n_half = 4\n__twice = 5\ncount = _half * 2\n')
    assert load(tmp_path / "one.py") == DEFAULTS | {"count": 8}
    for arg in ("--_half=4", "--__name__=x"):
        with pytest.raises(ValueError, match="there is no setting"):
            load(arg)


def test_unknown_names_and_files(tmp_path):
    (tmp_path / "one.py").write_text("cuont = 4\n")
    for arg in (tmp_path / "one.py", "--cuont=4"):
        with pytest.raises(ValueError, match=r"no setting 'cuont'; did you mean 'count'\?"):
            load(arg)
    with pytest.raises(FileNotFoundError, match=r"two.py"):
        load(tmp_path / "two.py")


# --- stop -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank, waits", [(None, 0), ("0", 0), ("1", 10), ("7", 10)])
def test_stop(monkeypatch, rank, waits):
    """Rank 0 speaks at once. The others wait: where all meet the mistake, torchrun ends them
    meanwhile, and one that met it alone still says it."""
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as end:
        common.stop(ValueError("a row,\n  and more"))
    assert end.value.code == "error: a row, and more" and sum(slept) == waits


# --- numbers --------------------------------------------------------------------------------------


def test_seed_of():
    """The value is part of the promise that a run can be repeated: on any machine, for good."""
    assert common.seed_of(1, "val", 3) == 271034789816983
    parts = [(s, t, q, d) for s in (1, 2) for t in range(9) for q in range(9) for d in (0, 1)]
    parts += [(1, "val", q) for q in range(9)] + [(1, 23), (12, 3), ("1", 23), (123,)]
    seeds = [common.seed_of(*p) for p in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**48 for seed in seeds) and max(seeds) > 2**46


def test_gather(process_group):
    assert common.gather({"x": 1}) == [{"x": 1}]


def test_timed_adds_up():
    times = {"other": 1.0}
    for _ in range(2):
        with common.timed(times, "sleep"):
            time.sleep(0.05)
    assert 0.1 <= times["sleep"] < 0.5 and times["other"] == 1.0


def test_write_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [{"step": 0, "a": math.inf, "b": -math.inf, "c": math.nan, "d": 1.5},
               {"step": 1, "text": "Ü\n\u2028", "e": [1], "f": None, "g": True}]
    common.write_lines(path, records)

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    def read():  # split by "\n" alone: a text may hold other line ends
        return [json.loads(x, parse_constant=refuse) for x in path.read_text()[:-1].split("\n")]

    assert path.read_text().endswith("}\n")
    assert read() == [{"step": 0, "a": None, "b": None, "c": None, "d": 1.5}, records[1]]
    assert math.isinf(records[0]["a"]), "the caller's record was changed"
    common.write_lines(path, [{"step": 2}], "a")
    assert [r["step"] for r in read()] == [0, 1, 2]
    common.write_lines(path, [{"step": 3}])
    assert [r["step"] for r in read()] == [3]


# --- open_run -------------------------------------------------------------------------------------


def settings(out, **changed):
    argv = [f"--{k}={v}" for k, v in {"out_dir": out / "run", **changed}.items()]
    return common.load_config(train_grpo.defaults, argv)


def open_run(cfg, rows):
    """As the trainers do, which find the checkpoint first, in a process that ends soon after."""
    latest = Path(cfg.out_dir, "checkpoints/latest").resolve()
    try:
        common.open_run(cfg, rows, latest if latest.exists() else None)
    finally:
        Path(cfg.out_dir, "lock").unlink()  # the next one is another file, which nobody holds


def saved(out, step, lines=()):
    """What a step that was saved leaves, in a folder that open_run() has made."""
    folder = out / f"run/checkpoints/step_{step:06d}"
    folder.mkdir(parents=True)
    (out / "run/checkpoints/latest").symlink_to(folder.name)
    (out / "run/metrics.jsonl").write_text("".join(lines))
    return folder


def line(step):
    return json.dumps({"step": step, "loss": None, "text": "}"}) + "\n"


def config_of(out):
    return json.loads((out / "run/config.json").read_text())


def test_a_new_run(tmp_path, capsys):
    open_run(settings(tmp_path, seed=3), "abc")
    expected = train_grpo.defaults | {"seed": 3, "out_dir": str(tmp_path / "run")}
    assert config_of(tmp_path) == expected | {
        "script": Path(sys.argv[0]).name, "train_rows": "abc", "changes": []}
    assert (tmp_path / "run/metrics.jsonl").read_text() == ""
    assert (tmp_path / "run/rollouts").is_dir()
    assert capsys.readouterr().out == ""


def test_a_run_is_continued(tmp_path, capsys):
    open_run(settings(tmp_path), "abc")
    saved(tmp_path, 2, [line(0), line(1), line(2)])
    open_run(settings(tmp_path), "abc")
    assert "after step 2, changed: nothing" in capsys.readouterr().out
    assert (tmp_path / "run/metrics.jsonl").read_text() == line(0) + line(1) + line(2)
    assert config_of(tmp_path)["changes"] == []


def test_a_run_that_has_not_ended_is_left_alone(tmp_path):
    """Another process holds its lock, until it is killed."""
    open_run(settings(tmp_path), "abc")
    saved(tmp_path, 2, [line(0), line(1), line(2), line(3)])
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print(); input()"
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path / "run/lock"], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(ValueError, match=r"a run in .*run has not ended: end it first"):
        common.open_run(settings(tmp_path, seed=1), "abc", None)
    assert (tmp_path / "run/metrics.jsonl").read_text().count("\n") == 4, "it was cut"
    other.kill()
    other.communicate()
    open_run(settings(tmp_path), "abc")
    assert (tmp_path / "run/metrics.jsonl").read_text().count("\n") == 3


@pytest.mark.parametrize("half", ["", '{"step": 2, "lo', '{"step": 2, "text": "}', line(2)[:-1]])
def test_metrics_are_cut_to_the_checkpoint(tmp_path, half):
    """Steps 3 and 12 were logged, but not saved; the last line may be half written."""
    open_run(settings(tmp_path), "abc")
    saved(tmp_path, 2, [line(0), line(1), line(2), line(3), line(12), half])
    open_run(settings(tmp_path), "abc")
    assert (tmp_path / "run/metrics.jsonl").read_text() == line(0) + line(1) + line(2)


FREE = {"steps": 9, "epochs": 9, "validate_every": 9, "save_every": 9, "keep_checkpoints": 9,
        "log": "wandb", "engine_args": {"max_num_seqs": 9}, "tokens_per_micro_batch": 9999,
        "activation_checkpointing": True, "accept_changes": True, "engine": "torch",
        "tensor_parallel": 2, "gpu_memory_utilization": 0.9, "max_engine_gap": 0.9,
        "judge_url": "http://elsewhere/v1", "judge_api_key_env": "KEY", "judge_timeout_s": 9.0,
        "judge_patience_s": 9.0, "judge_concurrency": 9, "max_unscored": 0.9, "offload": True,
        "shard_ranks": 2}


@pytest.mark.parametrize("name", FREE)
def test_free_changes_are_said_and_recorded(tmp_path, capsys, name, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    open_run(settings(tmp_path), "abc")
    saved(tmp_path, 2, [line(0)])
    open_run(settings(tmp_path, **{name: FREE[name]}), "abc")
    change = f"{name} was {train_grpo.defaults[name]!r} and is {FREE[name]!r}"
    assert change in capsys.readouterr().out
    assert config_of(tmp_path)[name] == FREE[name]
    assert config_of(tmp_path)["changes"] == [{"after_step": 2, "change": change}]
    open_run(settings(tmp_path), "abc")  # and back: the record of the first one stays
    assert [c["change"].split()[0] for c in config_of(tmp_path)["changes"]] == [name, name]


def test_a_run_may_be_moved(tmp_path):
    open_run(settings(tmp_path), "abc")
    saved(tmp_path, 2)
    (tmp_path / "run").rename(tmp_path / "moved")
    cfg = settings(tmp_path, out_dir=tmp_path / "moved")
    open_run(cfg, "abc")
    assert json.loads((tmp_path / "moved/config.json").read_text())["changes"] != []


FIXED = {"model": "other", "seed": 2, "prompts_per_step": 8, "group_size": 7, "updates_per_step": 1,
         "max_prompt_tokens": 9, "max_response_tokens": 9, "min_pixels": 9, "max_pixels": 9,
         "prompt_template": "{question}", "freeze_vision": True, "lora_rank": 8,
         "train_rows": "xyz"}


def refused(tmp_path, changed):
    before = config_of(tmp_path), (tmp_path / "run/metrics.jsonl").read_text()
    rows = changed.pop("train_rows", "abc")
    with pytest.raises(ValueError) as error:
        open_run(settings(tmp_path, **changed), rows)
    after = config_of(tmp_path), (tmp_path / "run/metrics.jsonl").read_text()
    assert before == after, "a refused start changed the run"
    assert "\n" not in str(error.value) and str(tmp_path / "run") in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("accept", [False, True])
@pytest.mark.parametrize("name", FIXED)
def test_fixed_settings_never_change(tmp_path, name, accept):
    open_run(settings(tmp_path), "abc")
    saved(tmp_path, 2, [line(2), line(3)])
    message = refused(tmp_path, {name: FIXED[name], "accept_changes": accept})
    was = "abc" if name == "train_rows" else train_grpo.defaults[name]
    assert f"{name} was {was!r} and is {FIXED[name]!r}" in message
    assert "another out_dir" in message
    assert "--accept_changes" not in message, "it would not help"


@pytest.mark.parametrize(
    "name, value", [("learning_rate", 1e-3), ("kl_coef", 0.0), ("loss", "gspo")])
def test_others_change_only_when_accepted(tmp_path, capsys, name, value):
    open_run(settings(tmp_path), "abc")
    saved(tmp_path, 2, [line(2), line(3)])
    change = f"{name} was {train_grpo.defaults[name]!r} and is {value!r}"
    message = refused(tmp_path, {name: value})
    assert change in message and "--accept_changes=True" in message
    cfg = settings(tmp_path, accept_changes=True, **{name: value})
    open_run(cfg, "abc")
    assert change in capsys.readouterr().out
    assert config_of(tmp_path)[name] == value
    assert change in config_of(tmp_path)["changes"][0]["change"]
    assert (tmp_path / "run/metrics.jsonl").read_text() == line(2)


def test_a_run_without_a_checkpoint_starts_again(tmp_path):
    """And with whatever settings: there is nothing that they could contradict."""
    open_run(settings(tmp_path), "abc")
    (tmp_path / "run/metrics.jsonl").write_text(line(0) + line(1))
    open_run(settings(tmp_path, seed=2), "xyz")
    assert (tmp_path / "run/metrics.jsonl").read_text() == ""
    assert config_of(tmp_path)["seed"] == 2 and config_of(tmp_path)["changes"] == []


def test_free_and_fixed_name_settings():
    names = {*train_grpo.defaults, "train_rows"}
    assert {*common.FREE} <= names and {*common.FIXED} <= names
    assert not {*common.FREE} & {*common.FIXED}
    assert {*FIXED} == {*common.FIXED}, "each of them is tried above"
    assert {*FREE} == {*common.FREE} - {"out_dir"}, "each of them is tried above"
    every = {k for k in names if k.endswith("_every")}
    assert every and every <= {*common.FREE}


# --- dashboards -----------------------------------------------------------------------------------

DASHBOARD = """
import os, sys, common
from types import SimpleNamespace
common.start()
cfg = SimpleNamespace(**common.defaults | dict(log=sys.argv[1], out_dir=sys.argv[2]))
common.open_run(cfg, "rows", None)
run = SimpleNamespace(cfg=cfg, state={"step": 0, "not_finite": 0, "best": None}, signals=[],
                      times={}, rank=0, world=1, last_step=9)
for step in range(3):
    run.state["step"] = step
    run.times["step"] = 1.0
    metrics = {"tokens": 8, "reward/overall": 0.25 * step}
    common.finish_step(run, metrics, lambda run: {}, lambda run: None, step == 2)
os._exit(0)
"""


def dashboard(log, out):
    """Three steps in a process of their own, which then ends as training does."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    env |= {f"WANDB_{name}_DIR": str(out / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
    return subprocess.run([sys.executable, "-c", DASHBOARD, log, out], env=env, cwd=out, text=True,
                          capture_output=True, timeout=300)


@pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="wandb is not installed")
def test_wandb_gets_every_scalar(tmp_path):
    """Offline: what it would send lies in a file, the names and values in it as plain text."""
    run = dashboard("wandb", tmp_path)
    if run.returncode and "wandb.init" in run.stderr:
        pytest.skip(f"wandb does not start here: {run.stderr.strip().splitlines()[-1]}")
    assert run.returncode == 0, run.stderr
    ident = f"{common.seed_of(str(tmp_path)):x}"  # from out_dir, so that a restart goes on in it
    files = [*tmp_path.glob(f"wandb/offline-run-*-{ident}/run-{ident}.wandb")]
    assert len(files) == 1, [str(p) for p in tmp_path.rglob("*")]
    for text in (b"reward/overall", b"time/step", b"0.25", b"nanomedix"):
        assert text in files[0].read_bytes(), text


def test_no_dashboard(tmp_path):
    run = dashboard("", tmp_path)
    assert run.returncode == 0, run.stderr
    assert not any("wandb" in path.name for path in tmp_path.iterdir())
