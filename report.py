"""Pictures of runs.

    python report.py curve RUN... --out curve.png    # RUN: a run's out_dir; one colour each
"""
import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LOOK = {"font.size": 13, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.alpha": 0.25, "legend.frameon": False, "legend.fontsize": 11, "lines.linewidth": 2}
GREEDY, TRAINING = {"marker": "o", "markersize": 4}, {"lw": 1, "alpha": 0.3}
PANELS = {  # title -> (legend, metric, style of the line)
    "reward": [("greedy", "val/reward/overall", GREEDY), ("training", "reward/overall", TRAINING),
               ("sampled", "val_sampled/reward/overall", {"ls": "--"})],
    "parts of the reward (greedy)": [
        (part, f"val/reward/{part}", {"ls": ls})
        for part, ls in (("judge", "-"), ("embed", "--"), ("modality", "-."), ("format", ":"))],
    "response length, tokens": [("greedy", "val/response_tokens/mean", GREEDY),
                                ("training", "response_tokens/mean", TRAINING)]}


def read_metrics(folder):
    """The lines of RUN/metrics.jsonl as dicts, less a last one that is still being written."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise SystemExit(f"{path} does not exist: give the out_dir of a run")
    lines, rows = path.read_text().splitlines(), []
    for number, text in enumerate(lines, 1):
        try:
            rows.append(json.loads(text))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise SystemExit(f"{path}, line {number} is not JSON: mend or remove it") from error
            print(f"note: {path} ends in a half-written line, left out")
    if not any("val/reward/overall" in row for row in rows):
        raise SystemExit(f"{path} has no validation: wait for one, or set validate_every above 0")
    return rows


def curve(runs, out):
    """Draw {name of a run: its metrics}: reward, its parts and response length by step."""
    plt.rcParams.update(LOOK)
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.9), layout="constrained")
    for ax, (title, lines) in zip(axes, PANELS.items()):
        for label, key, style in lines:
            for i, rows in enumerate(runs.values()):
                points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
                if points:
                    ax.plot(*zip(*points), color=f"C{i}", **style)
            if any(row.get(key) is not None for rows in runs.values() for row in rows):
                ax.plot([], [], label=label, color="0.35", **style)  # grey: for all runs alike
        ax.set(title=title, xlabel="step", ylim=(0, 1.03) if ax is not axes[2] else (0, None))
        ax.legend(*ax.get_legend_handles_labels(), loc="lower right")
    colours = [plt.Line2D([], [], color=f"C{i}", lw=5) for i in range(len(runs))]
    figure.legend(colours, runs, loc="outside upper center", ncols=4, fontsize=15)
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    command = parser.add_subparsers(dest="command", required=True).add_parser("curve")
    command.add_argument("runs", nargs="+", metavar="RUN")
    command.add_argument("--out", default="curve.png")
    args = parser.parse_args()
    curve({run.rstrip("/"): read_metrics(run) for run in args.runs}, args.out)
