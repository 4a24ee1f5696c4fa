"""What is pasted elsewhere does there what it does here: loss.py against the loss of the real TRL,
and the README's two reward functions, one in TRL's trainer, one called the way EasyR1 calls it."""

import contextlib
import functools
import json
import math
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from judge_server import judge
from ranks import ROOT
from scoring import score
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil, Qwen3VLProcessor, TrainerCallback

import common
import loss
import reward

trl = pytest.importorskip("trl", reason="TRL is not installed: make test")
PROMPTS, GROUP = 6, 4  # a step's questions, and responses to each
# The settings of the README's snippets that a test has to have otherwise: no download, no patience.
SETTINGS = {"embedder": "ngram", "judge_check": False, "judge_args": {}, "judge_timeout_s": 2.0,
            "judge_patience_s": 0.2}


class Processor(Qwen3VLProcessor):
    """transformers' own without videos, for which it wants torchvision even if there are none."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


def snippet(word):
    """The README's one block of Python that has this word in it."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    [block] = [block for block in blocks if word in block]
    return block


def trainer_of(start, out, reward_func, callbacks=(), **settings):
    """TRL's GRPOTrainer of the barely warmed-up tiny model and its questions on images, in fp32."""
    rows = Dataset.from_parquet(str(start / "data/train.parquet"), cache_dir=str(out / "cache"))
    rows = rows.rename_column("image", "images").map(
        lambda row: {"prompt": [{"role": "user", "content": row["problem"]}]})
    tokenizer = AutoTokenizer.from_pretrained(start / "model")
    images = Qwen2VLImageProcessorPil.from_pretrained(start / "model")
    marks = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    config = trl.GRPOConfig(
        output_dir=str(out), use_cpu=True, bf16=False, gradient_checkpointing=False, seed=3,
        report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1, max_steps=2,
        num_generations=GROUP, max_completion_length=40,
        # A sampled image token without an image would end the run.
        generation_kwargs={"suppress_tokens": tokenizer.convert_tokens_to_ids(marks)},
        **{"per_device_train_batch_size": PROMPTS * GROUP, **settings})
    return trl.GRPOTrainer(
        str(start / "model"), reward_func, config, train_dataset=rows, callbacks=list(callbacks),
        processing_class=Processor(images, tokenizer, chat_template=tokenizer.chat_template))


# --- loss.py --------------------------------------------------------------------------------------


def length_reward(completions, **others):
    return [float(len(c[0]["content"])) for c in completions]


@pytest.fixture(scope="module")
def batch(start, tmp_path_factory):
    """What TRL itself sampled for some prompts with images, and log-probs of two other policies:
    old ones from which every token has moved, whole responses by factors from 0.4 to 5."""
    trainer = trainer_of(start, tmp_path_factory.mktemp("batch"), length_reward)
    inputs = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    logprobs, _, _ = loss_of(trainer, inputs)
    torch.manual_seed(0)
    moved = torch.linspace(-0.9, 1.6, len(logprobs))[:, None] + torch.randn_like(logprobs) / 2
    inputs["old_per_token_logps"] = logprobs - moved
    inputs["ref_per_token_logps"] = logprobs + torch.randn_like(logprobs).clamp(-2, 2)
    inputs["advantages"] = torch.tensor([1.3, -0.7, 0.0] * (len(logprobs) // 3))
    assert len(inputs["completion_mask"].sum(1).unique()) > 3  # or all means were the same
    return inputs


def loss_of(trainer, inputs):
    """TRL's own forward and loss: its log-probs (B, T), the loss, its gradient by these (B, T)."""
    forward, seen = trainer._get_per_token_logps_and_entropies, []

    def tapped(*args, **more):
        seen.append(forward(*args, **more))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_get_per_token_logps_and_entropies", tapped)
        patch.setattr(trainer, "current_gradient_accumulation_steps",
                      trainer.args.steps_per_generation, raising=False)  # as its train() does
        value = trainer._compute_loss(trainer.model.train(), inputs)
    [(logprobs, _, _)] = seen
    [gradient] = torch.autograd.grad(value, logprobs)
    return logprobs.detach(), value.detach(), gradient


def our_loss(logprobs, inputs, kind, loss_mean, tokens, responses, beta, **clip):
    """loss.py on the same tensors, put together as in train_grpo.backward; what was clipped."""
    mask, logprobs = inputs["completion_mask"], logprobs.clone().requires_grad_()
    per_token, clipped = loss.policy_loss(logprobs, inputs["old_per_token_logps"],
                                          inputs["advantages"][:, None], mask, kind, **clip)
    per_token = per_token + beta * loss.kl_penalty(logprobs, inputs["ref_per_token_logps"])
    value = (per_token * loss.token_weights(mask, loss_mean, tokens, responses)).sum()
    [gradient] = torch.autograd.grad(value, logprobs)
    return value.detach(), gradient, clipped


SEQUENCE = {"importance_sampling_level": "sequence"}
SAME = [  # kind, loss_mean, TRL's settings
    ("grpo", "token", {"loss_type": "dapo"}),
    ("grpo", "sequence", {"loss_type": "grpo"}),
    ("gspo", "token", {"loss_type": "dapo", **SEQUENCE}),
    ("gspo", "sequence", {"loss_type": "grpo", **SEQUENCE}),
    ("cispo", "token", {"loss_type": "cispo"})]
RUNS = [(1, 0.0, None), (1, 0.04, 3.0), (3, 0.04, 3.0)]  # micro-batches, beta, delta
CASES = [(*same, *run) for same in SAME for run in RUNS]
# bnpo divides by the tokens of a micro-batch, so it is ours as long as there is only one.
CASES += [("grpo", "token", {"loss_type": "bnpo"}, *run) for run in RUNS if run[0] == 1]


@pytest.mark.parametrize("kind,loss_mean,settings,micro_batches,beta,delta", CASES)
def test_loss_and_gradient_are_trls(start, tmp_path, batch, kind, loss_mean, settings,
                                    micro_batches, beta, delta):
    """In each micro-batch of one update. Where TRL has it otherwise: CISPO without a lower bound
    and with an epsilon_high that is the bound itself; a KL times the ratio, unless told not to;
    neither ratio nor KL is clamped; "grpo" is ours for micro-batches of equal size."""
    cispo = kind == "cispo"
    low, high = (1.0, 0.28) if cispo else (0.2, 0.28)
    trainer = trainer_of(
        start, tmp_path, length_reward, gradient_accumulation_steps=micro_batches,
        per_device_train_batch_size=PROMPTS * GROUP // micro_batches, beta=beta, delta=delta,
        epsilon=low, epsilon_high=high + cispo, use_bias_correction_kl=False, **settings)
    utils = trl.trainer.utils
    parts = utils.split_tensor_dict(utils.split_pixel_values_by_grid(batch), micro_batches)
    tokens, hit = batch["completion_mask"].sum(), set()
    for inputs in map(utils.unsplit_pixel_values_by_grid, parts):
        logprobs, *theirs = loss_of(trainer, inputs)
        *ours, clipped = our_loss(
            logprobs, inputs, kind, loss_mean, tokens, PROMPTS * GROUP, beta, clip_ratio_low=low,
            clip_ratio_high=high, clip_ratio_dual=delta or math.inf)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)
        assert theirs[1].any()
        hit |= {k for k, v in clipped.items() if (v & (inputs["completion_mask"] > 0)).any()}
    assert hit == ({"high"} if cispo else {"low", "high", *["dual"] * bool(delta)})


# --- TRL's trainer with our reward ----------------------------------------------------------------


def judged(question, truth, answer):
    """A judge that is not "exact": the same first letter is enough for it."""
    return "YES" if answer[0].lower() == truth[0].lower() else "NO"


def write_defaults(folder, url):
    """A copy of configs/defaults.py with another judge, as a user changes it."""
    folder.mkdir(exist_ok=True)
    text = (ROOT / "configs/defaults.py").read_text()
    lines = [f"{k} = {v!r}\n" for k, v in {**SETTINGS, "judge_url": url}.items()]
    (folder / "defaults.py").write_text(text + "".join(lines))


@pytest.fixture(scope="module")
def training(start, tmp_path_factory):
    """Two steps of TRL with the README's reward function; the judge's server dies after the first.
    For each step: what the function was given and gave, and what TRL made of that."""
    steps, calls = [], []
    with contextlib.ExitStack() as life:
        server = life.enter_context(judge(rule=judged))
        folder, pasted = tmp_path_factory.mktemp("pasted"), {}
        write_defaults(folder / "configs", server.url)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            exec(snippet("def medical_reward"), pasted)

        @functools.wraps(pasted["medical_reward"])  # TRL logs it under its name
        def watched(**given):
            calls.append((given, pasted["medical_reward"](**given)))
            return calls[-1][1]

        class Watch(TrainerCallback):
            def on_step_end(self, args, state, control, **others):
                logged = {k: list(v) for k, v in trainer._logs["rewards"].items()}
                weights = [w.detach().clone() for w in trainer.model.parameters()]
                steps.append(SimpleNamespace(
                    given=calls[-1][0], rewards=calls[-1][1], logged=logged["medical_reward"],
                    advantages=torch.tensor(trainer._logs["advantages"]), weights=weights,
                    asked=list(server.requests)))
                life.close()

        trainer = trainer_of(start, tmp_path_factory.mktemp("trl"), watched, [Watch()],
                             temperature=0.6, learning_rate=1e-3)
        before = [w.detach().clone() for w in trainer.model.parameters()]
        trainer.train()
        again = life.enter_context(judge(rule=judged))
        settings = {**common.defaults, **SETTINGS, "judge_url": again.url}
        scorer = reward.load(SimpleNamespace(**settings))
        for step in steps:  # one response at a time
            columns = (step.given[k] for k in ("problem", "solution", "completions"))
            step.ours = [score(scorer, question, truth, [message["content"]])[0]
                         for question, truth, [message] in zip(*columns)]
        life.close()
    assert len(steps) == len(calls) == 2
    return SimpleNamespace(before=before, log=trainer.state.log_history, steps=steps)


def test_trl_trains_with_our_rewards(training):
    first = training.steps[0]
    ours = [parts["overall"] for parts in first.ours]
    assert first.rewards == ours and first.logged == pytest.approx(ours)
    assert training.log[0]["rewards/medical_reward/mean"] == pytest.approx(sum(ours) / len(ours))
    assert len({*ours}) > 2 and {parts["judge"] for parts in first.ours} == {0.0, 1.0}
    rows = {(q, s.partition("> ")[2]) for q, s in zip(first.given["problem"],
                                                      first.given["solution"])}
    asked = [(request.question, request.truth) for request in first.asked[1:]]  # after load's own
    assert asked and {*asked} <= rows
    assert all(image.size == (64, 64) for [image] in first.given["images"])
    assert training.log[0]["grad_norm"] > 0
    assert not all(w.equal(b) for w, b in zip(first.weights, training.before))


def compare_advantages(rewards, theirs):
    """TRL adds 1e-4 to a group's deviation, we 1e-6, and equal rewards give exactly 0 here only."""
    rewards, std = torch.tensor([rewards]), torch.tensor(rewards).std()
    ours = loss.group_advantages(rewards)[0] * (std + 1e-6) / (std + 1e-4)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 if ours.any() else 1e-3)
    return ours.any()


def test_advantages_are_trls(training):
    first = training.steps[0]
    rewards = torch.tensor(first.rewards, dtype=torch.float64).view(PROMPTS, GROUP).tolist()
    theirs = first.advantages.view(PROMPTS, GROUP)
    assert sum(map(compare_advantages, rewards, theirs)) > PROMPTS / 2


def test_a_dead_judge_is_no_reward_of_zero(training):
    """What needed no judge has its reward, the rest has none: to TRL they are not there, neither in
    the mean of their group nor in the log. Here the whole group would be dropped."""
    second = training.steps[1]
    dead = [r is None for r in second.rewards]
    assert any(dead) and not all(dead)
    for given, logged, parts in zip(second.rewards, second.logged, second.ours):
        assert math.isnan(logged) if given is None else given == parts["overall"]
    assert any(parts["overall"] for parts, none in zip(second.ours, dead) if none)  # once it lives
    scored = [r for r in second.rewards if r is not None]
    mean = sum(scored) / len(scored)
    assert training.log[1]["rewards/medical_reward/mean"] == pytest.approx(mean)
    for i in range(0, PROMPTS * GROUP, GROUP):
        none, advantages = torch.tensor(dead[i:i + GROUP]), second.advantages[i:i + GROUP]
        assert not advantages[none].any()
        left = [r for r in second.rewards[i:i + GROUP] if r is not None]
        if len(left) > 1:
            compare_advantages(left, advantages[~none])


# --- EasyR1 ---------------------------------------------------------------------------------------

# It loads the file under this name from its path, in a worker that is somewhere else, and calls the
# function with the responses of all groups; what it gets becomes a tensor and means.
EASYR1 = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("custom_reward_fn", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["custom_reward_fn"] = module
spec.loader.exec_module(module)
for batch in json.load(sys.stdin):
    try:
        print(json.dumps(module.compute_score(batch)))
    except Exception as error:
        print(json.dumps(repr(error)))
"""
GROUPS = {  # (problem, solution): responses
    ("Which organ?", "<X_RAY> left lung"): [
        "<X_RAY><thinking>a</thinking><answer>Left lung.</answer>",
        "<X_RAY><thinking>a</thinking><answer>lung</answer>",
        "<CT_SCAN><thinking>a</thinking><answer>spleen</answer>", "", "<thinking>\ud83d\ude00"],
    ("Was fehlt?", "<MRI_SCAN> ein Stück"): [
        "<MRI_SCAN><thinking></thinking><answer>nichts</answer>", "ein Stück",
        "<MRI_SCAN><thinking>a</thinking><answer>ein Stuck</answer>", "nichts", "nichts"]}


def test_easyr1_gets_our_rewards_or_an_error(tmp_path):
    """In a process that has nothing of ours but copies of the two files that the README names."""
    batch = [{"response": text, "response_length": len(text), "ground_truth": json.dumps(row)}
             for row, texts in GROUPS.items() for text in texts]
    down = {**batch[0], "response": "unheard of"}
    with judge(rule=judged) as server:
        server.script = lambda request: "503" if request.answer == "unheard of" else "ok"
        settings = {**SETTINGS, "judge_url": server.url}
        shutil.copy(ROOT / "reward.py", tmp_path)
        write_defaults(tmp_path, server.url)
        (tmp_path / "pasted.py").write_text(snippet("def compute_score"))
        run = subprocess.run(
            [sys.executable, "-I", "-c", EASYR1, tmp_path / "pasted.py"], cwd="/", text=True,
            input=json.dumps([batch, batch + [down]]), capture_output=True)
        assert run.returncode == 0, run.stderr
        scorer = reward.load(SimpleNamespace(**{**common.defaults, **settings}))
        ours = [score(scorer, *row, texts) for row, texts in GROUPS.items()]
    scores, error = map(json.loads, run.stdout.splitlines()[-2:])
    assert scores == sum(ours, []) and len({s["overall"] for s in scores}) > 4
    assert all(type(value) is float for score in scores for value in score.values())
    assert error.startswith("RuntimeError('the judge failed: ") and "HTTP 503" in error
