"""Train a vision-language model on medical image questions with GRPO (arXiv 2402.03300).
    torchrun --nproc_per_node 2 train_grpo.py configs/tiny.py --learning_rate=1e-4
A step: weights -> engine -> responses -> rewards -> advantages -> packed rows -> updates."""
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch

import common
import data
import loss as objective
import policy
import reward
import rollout

defaults = common.defaults | dict(  # all others: configs/defaults.py
    out_dir="out/grpo", loss="grpo", loss_mean="token",  # "gspo", "cispo"; or over a "sequence"
    clip_ratio_low=0.2, clip_ratio_high=0.3, clip_ratio_dual=3.0, kl_coef=0.01)

def set_up(cfg):
    """Settings -> all that a run needs. Mistakes in settings and data are found before weights."""
    common.check(cfg, int(os.environ.get("WORLD_SIZE", 1)))
    cfg.prompt_template = data.read_template(cfg.prompt_template)
    run = SimpleNamespace(cfg=cfg, times={}, gaps_over=2, signals=[], threads=ThreadPoolExecutor(4))
    run.rank, run.world, run.device = common.start(run.signals)
    run.peak = policy.matmul_rate(run.device, cfg.dtype)
    run.scorer = reward.load(cfg, run.device, run.world)
    run.processor = data.load_processor(cfg.model)
    run.train, run.val = (data.load(source, run.processor, cfg, reward.TAGS, run.rank, run.world,
                                    common.gather) for source in (cfg.train_data, cfg.val_data))
    run.val_rows = data.order(run.val.keep, 0, 0, len(run.val.keep))[:cfg.val_prompts or None]
    run.last_step = cfg.steps or -(-cfg.epochs * len(run.train.keep) // cfg.prompts_per_step)
    found = policy.find_checkpoint(f"{cfg.out_dir}/checkpoints")
    common.gather(run.rank == 0 and common.open_run(cfg, run.train.fingerprint, found))
    if not os.path.exists(f"{cfg.out_dir}/config.json"):
        raise ValueError(f"out_dir={cfg.out_dir} must be on a disk that all nodes share")
    run.model = policy.load(cfg, run.device)
    run.reference = policy.load(cfg, run.device, run.model) if cfg.kl_coef else None
    if run.rank == 0:
        common.print_arithmetic(run)
    run.optimizer = policy.adamw(run.model, cfg.learning_rate, cfg.beta2, cfg.weight_decay)
    run.patches = lambda images: data.patches(images, run.processor, run.device)
    run.engine = rollout.load(cfg, run.device, run.patches)
    run.logprobs = lambda model, row: policy.logprobs(
        model, row, run.patches(row["images"]), cfg.temperature, run.engine.banned)
    saved = policy.load_checkpoint(found, run.model, run.optimizer) if found else {}
    run.state = {"step": 0, "updates": 0, "cursor": 0, "best": None} | saved | {"not_finite": 0}
    run.saved = run.state["step"]
    return run

def sample(run, split, rows, key, first=0, **sampling):
    """All ranks' groups for rows[first:], in this order: prompts, less images, with "responses":
    dicts of ids, logprobs, finish_reason, text and parts. No result depends on who is fast."""
    if run.engine.version != run.state["updates"]:
        with common.timed(run.times, "sync"):
            rollout.sync(run.engine, policy.named_weights(run.model))
        run.engine.version = run.state["updates"]
    # Rank slot % world scores a slot's group; an engine samples those of its ranks.
    engine, size = run.rank // run.cfg.tensor_parallel, run.cfg.tensor_parallel
    slots = [s for s in range(first, len(rows)) if s % run.world // size == engine]
    groups, jobs, sampling["max_tokens"] = [], [], run.cfg.max_response_tokens
    with common.timed(run.times, "rollout"):  # one pool: meanwhile images are read, answers judged
        prompts = run.threads.map(lambda slot: data.prompt(split, rows[slot]) | {
            "slot": slot, "seed": common.seed_of(  # a row that comes twice is two draws
                run.cfg.seed, key, rows[slot], rows[:slot].count(rows[slot]))}, slots)
        for prompt, responses in rollout.generate(run.engine, prompts, **sampling):
            if prompt["slot"] % run.world == run.rank:
                ids = [[t for t in r["ids"] if t not in run.engine.stop_ids] for r in responses]
                texts = run.processor.tokenizer.batch_decode(ids)
                jobs.append(reward.start(run.scorer, prompt["problem"], prompt["solution"], texts))
                groups.append(prompt | {"images": None, "responses": [
                    r | {"text": text, "answer": reward.find_answer(text)}
                    for r, text in zip(responses, texts)]})
    with common.timed(run.times, "reward_wait"):
        for group, scores in zip(groups, reward.finish(run.scorer, jobs)):
            for response, parts in zip(group["responses"], scores):
                response["parts"] = parts
        return sorted(sum(common.gather(groups), []), key=lambda group: group["slot"])

def collect(run, step):
    """The groups of a step, with advantages."""
    cfg = run.cfg
    rows = data.order(run.train.keep, cfg.seed, run.state["cursor"], cfg.prompts_per_step)
    groups = sample(run, run.train, rows, step,
                    group_size=cfg.group_size, temperature=cfg.temperature)
    add_advantages(groups)
    return groups

def add_advantages(groups):
    """Advantages from `overall`, in place; a group with an unscored response has none: dropped."""
    for group in groups:
        rewards = [r["parts"]["overall"] for r in group["responses"]]
        scored = None not in rewards
        advantages = objective.group_advantages(torch.tensor([[scored and x for x in rewards]]))[0]
        group |= {"scored": scored, "kept": bool(advantages.any())}
        for r, advantage in zip(group["responses"], advantages.tolist()):
            r["advantage"] = advantage

def plan_update(run, groups):
    """An update's rows on this rank, and its tokens and responses on all ranks. Groups of equal
    rewards teach nothing: without a KL term they skip the forward, but they count."""
    scored = [g for g in groups if g["scored"]]
    trained = [g for g in scored if g["kept"] or run.cfg.kl_coef]
    lengths = [len(r["ids"]) for g in scored for r in g["responses"]]
    rows = policy.build_rows(
        run.model, trained, run.cfg.tokens_per_micro_batch, run.rank, run.world,
        lambda group: group | data.prompt(run.train, group["row"]), run.threads.map)
    return SimpleNamespace(rows=rows, tokens=sum(lengths), responses=len(lengths))

def backward(run, update, row):
    """Add a row's gradient; returns its sums for the log."""
    cfg = run.cfg
    logprobs, entropy = run.logprobs(run.model, row)
    fresh = row.setdefault("old_logprobs", logprobs.detach())
    advantages, engine_logprobs, mask = (
        row[k].to(logprobs.device) for k in ("advantage", "logprobs", "mask"))
    old_logprobs = engine_logprobs if cfg.old_logprobs == "engine" else fresh
    token_loss, clipped = objective.policy_loss(
        logprobs, old_logprobs, advantages, mask, cfg.loss,
        cfg.clip_ratio_low, cfg.clip_ratio_high, cfg.clip_ratio_dual)
    if cfg.engine_is_cap:  # truncated importance sampling: the engine's policy drew the tokens
        ratio = (fresh - engine_logprobs).exp()  # of which policy_loss has all if old is engine's
        token_loss = token_loss * ratio.clamp(max=cfg.engine_is_cap) * (old_logprobs - fresh).exp()
        clipped["engine_is"] = ratio > cfg.engine_is_cap
    kl = objective.kl_penalty(logprobs, row.get("ref_logprobs", logprobs.detach()))
    weights = objective.token_weights(mask, cfg.loss_mean, update.tokens, update.responses)
    finite = 1 + 0 * (logprobs.detach() + engine_logprobs)  # NaN, as its gradient, where one is not
    loss = (token_loss + cfg.kl_coef * kl) * weights * finite
    # FSDP averages gradients over ranks, but these weights sum to 1 over all of them already.
    loss.sum().mul(run.world).backward()
    for response, part in zip(row["members"], loss.sum(1).tolist()):
        response["loss"] = response.get("loss", 0.0) + part
    sums = {"loss/policy": token_loss * weights, "loss/kl": kl * weights, "tokens": mask,
            "entropy": entropy * mask, **{f"clip_frac/{k}": v * mask for k, v in clipped.items()}}
    return {k: v.sum().item() for k, v in sums.items()} | policy.work(run.model, row)

def train(run, groups):
    """updates_per_step optimizer steps on the groups of all ranks; returns what to log."""
    cfg, state, n = run.cfg, run.state, run.cfg.updates_per_step
    updates = [plan_update(run, groups[len(groups) * u // n : len(groups) * (u + 1) // n])
               for u in range(n)]
    passes = [("ref_logprobs", run.reference)] * bool(cfg.kl_coef)  # if n is 1, new ones are old
    passes += [("old_logprobs", run.model)] * (cfg.old_logprobs == "trainer" and n > 1)
    for key, model in passes:
        with common.timed(run.times, key), torch.no_grad():
            for row in (row for update in updates for row in update.rows):
                row[key], _ = run.logprobs(model, row)
    done, norms, metrics = [], [], {}
    with common.timed(run.times, "update"):
        for update in [u for u in updates if u.rows]:  # no group to learn from: no step
            done += [backward(run, update, row) for row in update.rows]
            metrics = metrics or common.check_gap(run, updates)
            state["updates"] += 1
            lr = cfg.learning_rate * min(1.0, state["updates"] / max(cfg.warmup_updates, 1))
            norms.append(policy.optimizer_step(run.model, run.optimizer, lr, cfg.max_grad_norm))
    metrics["updates_skipped"] = n - sum(norm < float("inf") for norm in norms)
    return metrics | (common.update_metrics(run, groups, done, norms) | {"lr": lr} if norms else {})

def validate(run):
    """val/* (greedy) and, with val_temperature, val_sampled/* on the same prompts each time."""
    cfg, metrics = run.cfg, {}
    for name, t, top_p in ("val", 0.0, 1.0), ("val_sampled", cfg.val_temperature, cfg.val_top_p):
        if name == "val" or t:
            groups = sample(run, run.val, run.val_rows, "val",
                            group_size=1, temperature=t, top_p=top_p)
            common.write_groups(cfg.out_dir, name, run.state["step"], groups)
            metrics |= {f"{name}/{k}": v for k, v in common.response_metrics(groups).items()}
    return metrics

def save(run):
    """A checkpoint of the last finished step; its time is logged with the next one."""
    with common.timed(run.times, "save"):
        policy.save_checkpoint(f"{run.cfg.out_dir}/checkpoints", run.state["step"], run.model,
                               run.optimizer, run.state, run.cfg.keep_checkpoints)
    run.saved = run.state["step"]

def main():
    try:
        run = set_up(common.load_config(defaults, sys.argv[1:]))
    except (ValueError, OSError, ImportError) as error:  # a mistake that every rank meets
        common.stop(error)
    cfg, state = run.cfg, run.state
    try:
        if state["step"] == 0:
            common.finish_step(run, {}, validate, save)
        for step in range(state["step"] + 1, run.last_step + 1):
            with common.timed(run.times, "step"):
                groups = collect(run, step)
                rollout.sleep(run.engine)
                metrics = common.response_metrics(groups) | common.group_metrics(groups)
                common.check_goes_on(run, metrics["reward/unscored"])
                metrics |= train(run, groups)
            state |= {"step": step, "cursor": state["cursor"] + len(groups)}
            common.write_groups(cfg.out_dir, "step", step, groups)
            common.finish_step(run, metrics, validate, save, step == run.last_step)
    except (common.Stop, OSError) as why:
        if type(why) is common.Stop and run.saved != state["step"]:
            save(run)  # before an update: the last finished step is worth keeping
        common.stop(why if type(why) is common.Stop else OSError(f"{cfg.out_dir}: {why}"))

if __name__ == "__main__":
    main()
    os._exit(0)  # a thread of gloo that still frees a tensor would abort a Python that ends
