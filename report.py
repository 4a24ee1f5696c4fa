"""Pages and curves to look at. A page is one file, pictures included.
    python report.py RESULTS [--out page.html]  # scores and items of a results folder of eval.py
    python report.py rollouts OUT_DIR [--step N] [--out page.html]  # a run's groups; its last step
    python report.py curve [LABEL=]OUT_DIR... [--x trained] [--out curve.png]  # a colour a label"""
import argparse
import io
import json
from base64 import b64encode
from pathlib import Path

import matplotlib.pyplot as plt

LOOK = {"font.size": 13, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.alpha": 0.25, "legend.frameon": False, "legend.fontsize": 11, "lines.linewidth": 2}
WAYS = {"val/": dict(label="greedy", marker="o", ms=4), "": dict(label="training", lw=1, alpha=0.3),
        "val_sampled/": dict(label="sampled", ls="--")}  # by how a metric's name starts
PARTS = {"judge": "-", "embed": "--", "modality": "-.", "format": ":"}
PANELS = {  # title -> {metric: its name and look}
    "reward": {f"{way}reward/overall": look for way, look in WAYS.items()},
    "parts of the reward (greedy)": {f"val/reward/{p}": dict(label=p, ls=PARTS[p]) for p in PARTS},
    "response length, tokens": {f"{way}response_tokens/mean": WAYS[way] for way in ("val/", "")}}
COUNTED = {"trained": "groups/kept", "generated": "groups/sampled"}  # times group_size, for --x

def read_lines(path):
    """The dicts of a .jsonl file, less a last one that is still being written."""
    text = path.read_text("utf-8", "replace").rpartition("\n")[0]
    try:
        return json.loads("[" + text.replace("\n", ",\n") + "]")
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: mend or remove this line: {error}") from error

def read_run(run, x="step"):
    """OUT_DIR or LABEL=OUT_DIR -> label and lines of metrics.jsonl, each of which also knows x."""
    label, _, folder = (f"={run}" if Path(run).is_dir() else run).partition("=")
    rows, so_far = read_lines(Path(folder or run, "metrics.jsonl")), 0
    if not any("val/reward/overall" in row for row in rows):
        raise ValueError(f"{folder} has no validation: wait for one, or set validate_every above 0")
    if x in COUNTED:
        size = json.loads(Path(folder, "config.json").read_text())["group_size"]
        for row in rows:
            row[x] = so_far = so_far + size * row.get(COUNTED[x], 0)
    return label or folder.rstrip("/"), rows

def curve(runs, out, x="step"):
    """Draw [(label, lines of metrics.jsonl)]: reward, its parts and response length against x."""
    plt.rcParams.update(LOOK)
    keys = {label: plt.Line2D([], [], color=f"C{i}", lw=5) for i, label in enumerate(dict(runs))}
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.9), layout="constrained")
    for ax, top, (title, lines) in zip(axes, (1.03, 1.03, None), PANELS.items()):
        for metric, look in lines.items():
            for label, rows in runs:
                points = [(row[x], row[metric]) for row in rows if row.get(metric) is not None]
                ax.plot(*zip(*points), color=keys[label].get_color(), **look)
        ax.set(title=title, xlabel=f"responses {x}" if x in COUNTED else x, ylim=(0, top))
        drawn = dict(zip(*reversed(ax.get_legend_handles_labels())))  # a name once, in grey
        plt.setp(ax.legend(drawn.values(), drawn, loc="lower right").get_lines(), color="0.35")
    figure.legend(keys.values(), keys, loc="outside upper center", ncols=4, fontsize=15)
    figure.savefig(out, dpi=120)

def results(folder):
    """What to show of a task: items with pictures, and at most 20 errors; without any, 20 items."""
    tasks, shown, endings = {}, {}, ("", *(f"_{i}" for i in range(1, 10)))
    for item in {item["id"]: item for item in read_lines(folder / "responses.jsonl")}.values():
        files = [folder / f"images/{item['task']}_{item['row']}{end}.jpg" for end in endings]
        item["images"] = [b64encode(file.read_bytes()).decode() for file in files if file.is_file()]
        tasks.setdefault(item["task"], []).append(item)
    for items in tasks.values():
        pictured = [x for x in items if x["images"]]
        others = [x for x in items if x["error"] or not pictured]
        shown |= {x["id"]: x for x in pictured + others[::len(others) // 20 + 1]}
    judged = [x for x in read_lines(folder / "judgements.jsonl") if x["id"] in shown]
    config, scores = (json.loads((folder / f"{x}.json").read_text()) for x in ("config", "scores"))
    return {"config": config, "scores": scores, "items": [*shown.values()], "judgements": judged}

def rollouts(folder, step):
    """What to show of a step: of its train and val groups at most 100, with the rows' images."""
    import data  # takes seconds
    config, items = json.loads((folder / "config.json").read_text()), []
    step = read_lines(folder / "metrics.jsonl")[-1]["step"] if step is None else step
    for file in sorted(folder.glob(f"rollouts/*_{step:06d}.jsonl")):
        split, groups = file.stem[:-7], read_lines(file)
        rows, base = data.read_rows(config["train_data" if split == "step" else "val_data"])
        for group in groups[::len(groups) // 100 + 1]:
            row = rows[group["row"]] if group["row"] < len(rows) else {}
            if [row.get("problem"), row.get("solution")] != [group["prompt"], group["solution"]]:
                raise ValueError(f"{file}: row {group['row']} of the data has changed, put it back")
            images, group["images"] = row.get("image", row.get("images")) or [], []
            for image in images if isinstance(images, list) else [images]:
                x = image if isinstance(image, dict) else {"path": image}
                image = data.decode({"bytes": x.get("bytes") or Path(base, x["path"]).read_bytes()})
                image.thumbnail((512, 512))
                image.save(jpeg := io.BytesIO(), "JPEG", quality=85, subsampling=0)
                group["images"].append(b64encode(jpeg.getvalue()).decode())
            items.append(group | {"split": split})
    if not items:
        raise ValueError(f"{folder}/rollouts has nothing of step {step}: give another --step")
    return {"config": config, "step": step, "items": items}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("what", nargs="+")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--step", type=int)
    parser.add_argument("--x", choices=["step", *COUNTED], default="step")
    args = parser.parse_args()
    command, *folders = args.what if args.what[0] in ("rollouts", "curve") else ["", *args.what]
    try:
        if command == "curve":
            curve([read_run(run, args.x) for run in folders], args.out or "curve.png", args.x)
        else:
            content = rollouts(Path(*folders), args.step) if command else results(Path(*folders))
            page = Path(__file__).with_name("assets").joinpath("report.html").read_text("utf-8")
            text = json.dumps(content, allow_nan=False).replace("<", "\\u003c")
            out = args.out or Path(*folders, "page.html")
            out.write_text(page.replace("{{data}}", text), "utf-8")
    except (OSError, ValueError, RecursionError) as error:
        hint = ": give a run's out_dir, or results that eval.py has scored"
        raise SystemExit(f"error: {error}{hint * isinstance(error, OSError)}") from error
