"""How often cheap judges agree with people on whether a medical answer is right.

    python bench/judge_agreement.py FOLDER [--embedder NAME_OR_FOLDER]

FOLDER holds craftmd_dermatologist.jsonl, craftmd_gpt4_judged.jsonl and evouna_biomed.jsonl: rows of
predicted, ground_truth (the last file's has aliases between slashes) and verdict, YES, NO or SPLIT,
which is left out. Judges: equality after normalisation; the cosine of n-grams and of the embedder
at each threshold, where, as in the reward, an equal answer is right and a much too long one wrong,
whatever the cosine; MediX-R1's rules. "negated" is the share of answers "no TRUTH" that pass for
TRUTH, over the dermatologist's truths: all of them are wrong."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import reward
import train_grpo

FILES = ("craftmd_dermatologist", "craftmd_gpt4_judged", "evouna_biomed")
THRESHOLDS = [round(0.6 + 0.05 * i, 2) for i in range(8)]
GOAL = 0.8  # a wrong answer that passes is paid a third of the reward


def read(path):
    """-> [(answer, [truth, ...], right)], number of rows left out."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    aliases = "/" if path.stem.startswith("evouna") else None
    pairs = [(row["predicted"], [t for t in row["ground_truth"].split(aliases) if t.strip()]
              if aliases else [row["ground_truth"]], row["verdict"] == "YES")
             for row in rows if row["verdict"] != "SPLIT"]
    return pairs, len(rows) - len(pairs)


def cosines(encode, pairs):
    """The largest cosine of each answer with one of its truths."""
    texts = list(dict.fromkeys(x for answer, truths, _ in pairs for x in (answer, *truths)))
    vectors = dict(zip(texts, encode(texts)))
    return [max((vectors[answer] @ vectors[truth].T).sum() for truth in truths)
            for answer, truths, _ in pairs]


def settled(pairs):
    """What the reward says unasked: 1.0 right, 0.0 wrong, None neither."""
    known = [[reward.settle(answer, truth) for truth in truths] for answer, truths, _ in pairs]
    return [1.0 if 1.0 in said else None if None in said else 0.0 for said in known]


def refused(pair):
    """Whether MediX-R1 gives an answer 0 without reading it."""
    answer = pair[0].strip().strip(".")
    return len(answer) < 2 or any(mark in answer for mark in ("__", ":", "?"))


def original(pair, cosine):
    """MediX-R1's rules: no refused answer; equal, but for dots at the ends, or a high cosine."""
    answer, *truths = (text.strip().strip(".") for text in (pair[0], *pair[1]))
    return not refused(pair) and (answer in truths or cosine >= 0.8)


def judges(pairs, encoders):
    """{name: what it says of each pair}."""
    known = settled(pairs)
    said = {"exact": [k == 1.0 for k in known]}
    for name, encode in encoders.items():
        values = cosines(encode, pairs)
        for threshold in THRESHOLDS:
            said[f"{name} {threshold}"] = [
                value >= threshold if k is None else k == 1.0 for k, value in zip(known, values)]
        said[f"MediX-R1's rules, {name}"] = list(map(original, pairs, values))
    return said


def scores(said, pairs):
    """Accuracy, precision, recall."""
    said, right = np.array(said), np.array([right for _, _, right in pairs])
    both = (said & right).sum()
    return (said == right).mean(), both / max(said.sum(), 1), both / max(right.sum(), 1)


def print_table(sets, table):
    print("accuracy, precision, recall\n\n| judge | " + " | ".join(
        f"{name}, n = {len(pairs)}" + (f" ({out} split left out)" if out else "")
        for name, (pairs, out) in sets.items()) + " |\n|" + "---|" * (len(sets) + 1))
    for judge in table["negated"]:
        cells = [" ".join(f"{x:.2f}" for x in scores(table[name][judge], sets[name][0]))
                 for name in FILES]
        print(f"| {judge} | {' | '.join(cells)} | {np.mean(table['negated'][judge]):.2f} |")
    print()
    for name in FILES:
        right = [pair for pair in sets[name][0] if pair[2]]
        print(f"{name}: of {len(right)} right answers {sum(map(refused, right))} are 0 unread by "
              f"MediX-R1's rules, {settled(right).count(0.0)} by ours")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--embedder", default="")
    args = parser.parse_args()
    names = {"ngram": "ngram"} | ({"embedder": args.embedder} if args.embedder else {})
    encoders = {column: reward.load_encoder(name, "cpu") for column, name in names.items()}
    sets = {name: read(args.folder / f"{name}.jsonl") for name in FILES}
    truths = dict.fromkeys(t for _, ts, _ in sets[FILES[0]][0] for t in ts)
    sets["negated"] = [(f"no {truth}", [truth], False) for truth in truths], 0
    table = {name: judges(pairs, encoders) for name, (pairs, _) in sets.items()}
    print_table(sets, table)
    # Equal answers are right without an embedder: what counts is what it adds to them.
    name, threshold = list(encoders)[-1], train_grpo.defaults["embed_threshold"]
    pairs, said = sets[FILES[0]][0], table[FILES[0]]
    added = [right for (_, _, right), passed, equal in zip(
        pairs, said[f"{name} {threshold}"], said["exact"]) if passed and not equal]
    precision = sum(added) / max(len(added), 1)
    print(f"precision of {name} {threshold} on the {len(added)} unequal answers it accepts, by "
          f"the dermatologist: {precision:.3f} (goal at least {GOAL})")
    sys.exit(int(precision < GOAL))


if __name__ == "__main__":
    main()
