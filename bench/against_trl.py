"""An update and a whole step against TRL's GRPOTrainer, on the same prompts, images and responses.

    python bench/against_trl.py

A process each, one thread, fp32, sdpa, the same AdamW; they take turns. The responses are given: to
TRL by its rollout_func. Model and data: bench/updates.py. What TRL gets for its good:

- Gradient checkpointing, which it switches on by default, is off.
- Its micro batch is the faster one of 1 and G responses.
- On CPUs it sends every position through the head, on GPUs those of the responses alone. Here it
  does as on GPUs (as it comes it has a row of its own).
- Its time starts when its pixels are made; ours includes reading and resizing the image.

Seconds are of the processor, not of the clock: others may use this machine. Both are printed.
Peak memory: of an update, above what the process holds before it (weights and AdamW's state). The
goal is for as many responses a pass, a group on both sides, as TRL's defaults have it (8
generations, 8 responses a device). With one response a pass TRL holds less, and so do we with
activations recomputed: both are printed, too.
Whole step: new weights to the sampler, G responses of R tokens (no id may end one), update. TRL
samples by transformers' generate(), we by rollout.py's torch engine.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import updates

import policy
import rollout
import train_grpo

GROUP, ONE = "trl, a group a pass", "trl, one a pass"
WORKERS = {
    "ours": {"recompute": False}, "ours, recomputing": {"recompute": True},
    GROUP: {"micro batch": 5, "as it comes": False}, ONE: {"micro batch": 1, "as it comes": False},
    "trl, as it comes": {"micro batch": 5, "as it comes": True}}
CASES = {2.5: 2.0, 8.0: 2.9}  # L / R: goal of the update
GOAL_MEMORY, GOAL_STEP, GOAL_GRADIENT = 0.5, 2.0, 1e-4
SIZE, SIDE, PROMPT = 5, 16, 400  # responses; image of 16 x 16 tokens; prompt tokens
BANNED = [2, 3, 4, 5, 6]  # when sampling: the end of a response, vision start and end, pads


def ours(case, asked):
    """A worker by train_grpo.py. "update" trains on the given responses, "gradient PATH" also saves
    its gradient, clipped; "step" samples, then trains."""
    run = updates.set_up(
        case["folder"], SIDE, prompts_per_step=1, group_size=SIZE, max_prompt_tokens=case["L"],
        max_response_tokens=case["R"], tokens_per_micro_batch=case["L"] + SIZE * case["R"],
        activation_checkpointing=case["recompute"])
    run.engine.stop_ids = set()
    given, path = updates.given(1, SIZE, case["R"]), ""

    def keep(*_):
        if path:
            torch.save({n: p.grad.full_tensor() for n, p in run.model.named_parameters()}, path)

    run.optimizer.register_step_pre_hook(keep)
    for command, reply in asked:
        name, _, path = command.partition(" ")
        groups, before, begin = updates.make_groups(run, given), updates.resident(), clocks()
        run.engine.banned[:] = BANNED if name == "step" else []
        if name == "step":
            advantages = [r["advantage"] for r in groups[0]["responses"]]
            groups = train_grpo.collect(run, 1)
            groups[0]["kept"] = True  # random responses: all are wrong, none would be trained on
            for response, advantage in zip(groups[0]["responses"], advantages):
                response["advantage"] = advantage
            rollout.sleep(run.engine)
        metrics = train_grpo.train(run, groups)
        reply(seconds=since(begin), memory=updates.memory("VmHWM") - before,
              entropy=metrics["entropy"], tokens=[len(r["ids"]) for r in groups[0]["responses"]])


def trl(case, asked):
    """The same worker by TRL: GRPOTrainer.train(), which waits for a command between two steps."""
    import trl.trainer.utils

    if not case["as it comes"]:
        trl.trainer.utils._use_triton = lambda device: True  # there it chooses the positions only
    ids, advantages = (x[0] for x in updates.given(1, SIZE, case["R"]).values())
    trainer = make_trainer(case, lambda completion_ids, **_: score(completion_ids))
    now = SimpleNamespace()

    def given(prompts, trainer):
        return {"prompt_ids": trainer._tokenize_prompts(prompts)[0], "completion_ids": ids,
                "logprobs": None}

    def wait(*_):
        command, now.reply = next(asked, ("", None))
        now.name, _, now.path = command.partition(" ")
        if not command:
            sys.exit()
        trainer.rollout_func = None if now.name == "step" else given
        now.before, now.begin = updates.resident(), clocks()

    def score(completions):  # the last thing before the update
        now.tokens = [len(x) for x in completions]
        if now.name != "step":
            now.before, now.begin = updates.resident(), clocks()
        return advantages

    def keep(*_):
        if now.path:
            torch.save({n: p.grad for n, p in trainer.model.named_parameters()}, now.path)

    def answer(*_):
        now.reply(seconds=since(now.begin), memory=updates.memory("VmHWM") - now.before,
                  entropy=trainer._metrics["train"]["entropy"][-1], tokens=now.tokens)
        wait()

    trainer.optimizer.register_step_pre_hook(keep)
    trainer.optimizer.register_step_post_hook(answer)
    wait()
    trainer.train()


def make_trainer(case, score):
    """A GRPOTrainer on the run's model, questions and resized images, whose rewards are score()'s:
    scale_rewards="none" and rewards of mean 0 make them the advantages."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen3VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from trl import GRPOConfig, GRPOTrainer

    folder, micro = f"{case['folder']}/model", case["micro batch"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Its part for videos wants torchvision; there is no video here.
    with mock.patch.object(Qwen3VLProcessor, "check_argument_for_proper_class"):
        processor = Qwen3VLProcessor(Qwen2VLImageProcessorPil.from_pretrained(folder), tokenizer,
                                     None, chat_template=tokenizer.chat_template)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    args = GRPOConfig(
        output_dir=f"{case['folder']}/trl", use_cpu=True, bf16=False, gradient_checkpointing=False,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        max_steps=10**6, lr_scheduler_type="constant", max_grad_norm=1.0, shuffle_dataset=False,
        num_generations=SIZE, per_device_train_batch_size=micro, temperature=1.0, beta=0.0,
        gradient_accumulation_steps=SIZE // micro, steps_per_generation=SIZE // micro,
        max_completion_length=case["R"], num_iterations=1, loss_type="dapo", epsilon=0.2,
        epsilon_high=0.3, scale_rewards="none", generation_kwargs={"suppress_tokens": BANNED})
    return GRPOTrainer(
        model, score, args, updates.conversations(case["folder"], SIDE), processing_class=processor,
        optimizers=(policy.adamw(model, 1e-6, 0.999, 0.01), None))


def clocks():
    return time.process_time(), time.perf_counter()


def since(begin):
    """Seconds of the processor and of the clock."""
    return [now - then for now, then in zip(clocks(), begin)]


def compare(ratio, folder):
    """Measure a case: {worker: {"update": [reply, ...], "step": [...], "gradient": difference}}."""
    case = {"folder": str(folder), "L": updates.make_start(folder, 1, PROMPT, SIDE)}
    case["R"] = round(case["L"] / ratio)
    workers = {name: updates.start(__file__, name.split(",")[0], case | settings)
               for name, settings in WORKERS.items()}
    for worker in workers.values():
        updates.listen(worker)
    found = {name: {"update": [], "step": []} for name in workers}
    for name, worker in workers.items():  # a first update, which also makes AdamW's state
        path = folder / "gradient"
        updates.ask([worker], f"gradient {path}")
        found[name]["gradient"] = torch.load(path, weights_only=True)
    mine = found["ours"]["gradient"]
    norm = torch.stack([g.norm() for g in mine.values()]).norm()
    for name in workers:
        theirs = found[name].pop("gradient")
        gaps = torch.stack([(theirs[n] - g).norm() for n, g in mine.items()])
        found[name]["gradient"] = (gaps.norm() / norm).item()
    for i in range(3):
        for name, worker in workers.items():
            if i == 0 or not name.endswith("as it comes"):
                found[name]["update"] += updates.ask([worker], "update")
    fast = min((GROUP, ONE), key=lambda name: median(found[name]["update"]))
    for _ in range(3):
        for name in "ours", fast:
            found[name]["step"] += updates.ask([workers[name]], "step")
    updates.end(workers.values())
    tokens = {tuple(r["tokens"]) for f in found.values() for r in f["update"] + f["step"]}
    assert tokens == {(case["R"],) * SIZE}, f"not all did the same work: {tokens}"
    return case, found, fast


def median(replies, clock=0):
    """Median seconds, of the processor or (1) of the clock."""
    return statistics.median(reply["seconds"][clock] for reply in replies)


def report(ratio, case, found, fast):
    """Print the table and the goals of a case; returns whether they were met."""
    L, R, G = case["L"], case["R"], SIZE
    print(f"\nL/R = {ratio}: {L} prompt tokens ({SIDE**2} of an image), {G} responses of {R}; "
          f"tokens predict {G * (L + R) / (L + G * R):.2f}")
    print("worker              | update, s | of the clock | peak MB | step, s | gradient differs")
    peaks = {n: statistics.median(r["memory"] for r in f["update"]) for n, f in found.items()}
    for name, f in found.items():
        step = f"{median(f['step']):7.2f}" if f["step"] else "      -"
        print(f"{name:19s} | {median(f['update']):9.2f} | {median(f['update'], 1):12.2f} | "
              f"{peaks[name]:7.0f} | {step} | {f['gradient']:.1e}")
    mine, theirs = found["ours"], found[fast]
    gradient = max(f["gradient"] for f in found.values())
    goals = [("update", median(theirs["update"]) / median(mine["update"]), CASES[ratio]),
             ("whole step", median(theirs["step"]) / median(mine["step"]), GOAL_STEP)]
    for name, times, goal in goals:
        print(f"{name} against TRL, L/R = {ratio}, times faster: {times:.2f} (goal >= {goal})")
    memory = peaks["ours"] / peaks[GROUP]
    print(f"peak memory, ours / TRL's, a group a pass, L/R = {ratio}: {memory:.2f} (goal <= "
          f"{GOAL_MEMORY})")
    print(f"TRL with one a pass: {peaks['ours'] / peaks[ONE]:.2f}, ours recomputing "
          f"{peaks['ours, recomputing'] / peaks[ONE]:.2f} (no goals)")
    print(f"gradient, relative difference: {gradient:.1e} (goal <= {GOAL_GRADIENT})")
    return (all(times >= goal for _, times, goal in goals) and memory <= GOAL_MEMORY
            and gradient <= GOAL_GRADIENT)


def main():
    updates.print_machine("trl", "transformers")
    met = []
    for ratio in CASES:
        with tempfile.TemporaryDirectory() as folder:
            met.append(report(ratio, *compare(ratio, Path(folder))))
    sys.exit(not all(met))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        updates.work({"ours": ours, "trl": trl})
    else:
        main()
