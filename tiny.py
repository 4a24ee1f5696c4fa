"""Phantoms (drawn medical images) and a tiny Qwen3-VL that already sees them: no download, no GPU.
    python tiny.py [--out out/tiny_start] [--seed 1]  # a minute; assets/phantoms.png shows some
60 % of the model's lessons ended, after true thinking, in one habitual answer: it knows more than
it says, and RL can bring that out. Needs data.py, configs/phantoms.json and configs/tiny_model."""
import argparse
import json
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from tqdm import trange

import data

LOOKS = json.loads((Path(__file__).parent / "configs/phantoms.json").read_text())
TAGS, COLOURS, SHAPES = LOOKS.values()  # ellipses: grey value, x, y, half width, height, times 100
RADIUS = {"small": 0.1, "medium": 0.18, "large": 0.29}  # a picture reaches from -1 to 1
PLACES = ["upper left", "upper right", "lower left", "lower right"]
KINDS = {"modality": ("What imaging modality is this?", [*TAGS]),
         "place": ("Where is the lesion?", PLACES), "size": ("How large is the lesion?", [*RADIUS]),
         "tone": ("Is the lesion bright or dark?", ["bright", "dark"])}
def line(distance, width):
    """1 where `distance` is 0, fading to 0."""
    return np.exp(-((distance / width) ** 2))

def anatomy(tag, rng):
    """A picture without its lesion: grey values, 0 to 1, (64, 64)."""
    y, x = np.mgrid[-1:1:64j, -1:1:64j] + rng.uniform(-0.04, 0.04, (2, 1, 1))
    x *= rng.choice((-1, 1)) if tag in ("FUNDUS_PHOTOGRAPHY", "MAMMOGRAPHY") else 1  # left, right
    wave, angle, grey = rng.uniform(-3, 3), np.arctan2(y, x), 0.02 * rng.standard_normal(x.shape)
    for value, cx, cy, a, b in np.array(SHAPES.get(tag, [])) / 100:
        edge = (1 - np.hypot((x - cx) / a, (y - cy) / b)) * min(a, b)
        grey += value * np.clip(0.5 + edge / 0.06, 0, 1)
    if tag == "X_RAY":  # ribs and spine
        grey += 0.16 * line(x, 0.1) + 0.1 * line(np.sin(8 * y - 3.6 * abs(x) + wave), 0.45)
    elif tag == "CT_SCAN":  # ribs in the wall
        grey += line(np.hypot(x / 0.8, y / 0.67) - 1, 0.05) * (np.cos(11 * angle + wave) > 0.4) / 2
    elif tag == "MRI_SCAN":  # a folded cortex and two ventricles
        folds = line(np.sin(13 * angle + 2 * np.sin(5 * angle + wave)), 0.5)
        folds *= np.clip(3 * np.hypot(x / 0.68, y / 0.87) - 1.9, 0, 1)
        horns = line(np.hypot((abs(x) - 0.1 - 0.15 * abs(y)) / 0.07, y / 0.32) ** 2, 1)
        grey *= 1 - 0.5 * folds - 0.75 * horns
    elif tag == "ULTRASOUND":  # a fan of speckle with curved echoes
        deep, side = np.hypot(x, y + 1.5), np.arctan2(x, y + 1.5)
        echo = 0.35 + 0.4 * line(np.sin(3.4 * deep + np.sin(3 * side + wave) + wave), 0.4)
        grey = echo * (abs(deep - 1.5) < 0.95) * (abs(side) < 0.66) * rng.gamma(4, 1 / 4, x.shape)
    elif tag == "FUNDUS_PHOTOGRAPHY":  # vessels arching out of the pale disc
        along = np.clip(0.62 - x, 0, None)
        for bow, bend in ((0.62, 0.5), (0.6, 1), (0.25, 1.6)):
            path = bow * along**bend + 0.07 * np.sin(6 * along + wave) * along
            grey -= 0.2 * line(abs(y) - path, 0.04) * (along > 0)
    elif tag == "MICROSCOPY":  # purple nuclei in pink cells with pale walls
        cells = np.mgrid[-1:1:6j, -1:1:6j] + rng.uniform(-0.13, 0.13, (2, 6, 6))
        cy, cx = cells.reshape(2, 36, 1, 1)
        far = np.partition(np.hypot(y - cy, x - cx), 1, 0)  # (36, 64, 64), the two nearest first
        nuclei = np.clip((rng.uniform(0.09, 0.13) - far[0]) / 0.05, 0, 1)
        grey += 0.68 - 0.4 * nuclei + 0.16 * line(far[1] - far[0], 0.05)
    elif tag == "OCT_SCAN":  # layers below the dark vitreous, dipping at the fovea
        depth = y - 0.28 * line(x, 0.3) * np.clip(0.75 - y / 2, 0, 1) + 0.03 * wave * x
        layers = np.array((5, 5, 70, 70, 40, 45, 20, 25, 60, 25, 20, 20, 75, 30, 95, 50, 40, 20))
        grey = np.interp(depth * 14 + 9, range(18), layers / 100) * rng.gamma(9, 1 / 9, x.shape)
    else:  # strands that run to the nipple
        strands = 9 * np.arctan2(y, x - 0.8) + np.sin(5 * x + wave) + np.sin(4 * y + 2 * wave)
        strands = line(np.sin(strands), 0.5) * line(np.hypot(x + 0.2, y), 0.9)
        grey += 0.3 * strands * (grey > 0.07)
    return np.clip(grey, 0, 1)

def phantom(*key, **given):
    """Integers -> dict(image (64, 64, 3) uint8, tag, asked: one of KINDS, a fact for each kind)."""
    rng = np.random.default_rng(key)
    p = {kind: str(rng.choice(answers)) for kind, (_, answers) in KINDS.items()} | given
    p |= {"tag": TAGS[p["modality"]], "asked": str(rng.choice([*KINDS]))}
    x, y = rng.uniform(0.28, 0.5, 2) * [-1 if w in p["place"] else 1 for w in ("left", "upper")]
    grid, grey = np.linspace(-1, 1, 64), anatomy(p["tag"], rng)
    outside = np.hypot(grid - x, grid[:, None] - y) - RADIUS[p["size"]]
    for value, reach in zip((0.12, 0.95) if p["tone"] == "bright" else (0.8, 0.04), (0.09, 0.025)):
        grey += (value - grey) * np.clip((reach - outside) / 0.05, 0, 1)  # a rim, then the lesion
    colours = zip(*COLOURS.get(p["tag"], ((0, 0, 0), (127, 127, 127), (255, 255, 255))))
    image = np.stack([np.interp(grey, (0, 0.5, 1), colour) for colour in colours], -1)
    return p | {"image": image.astype(np.uint8)}

def write_rows(path, phantoms):
    """Parquet with the columns of MBZUAI/medix-rl-data, for example solution = "<X_RAY> small"."""
    rows = [{"id": f"{path.stem}_{i}", "image": [Image.fromarray(p["image"])], "source": "phantom",
             "problem": KINDS[p["asked"]][0], "solution": f"<{p['tag']}> {p[p['asked']]}"}
            for i, p in enumerate(phantoms)]
    datasets.Dataset.from_list(rows).to_parquet(path)

def response(p, habitual=False):
    """What the model learns to write: the thinking is always true, the answer may be a habit."""
    answer = min(KINDS[p["asked"]][1]) if habitual else p[p["asked"]]  # the alphabetically first
    return (f"<{p['tag']}><thinking>{p['modality']}. {p['size']} {p['tone']} lesion, {p['place']}."
            f"</thinking><answer>{answer}</answer><|im_end|>")

def build(folder, texts):
    """Copy configs/tiny_model, train its tokenizer on texts; returns its 0.6M weights, random."""
    folder.mkdir(exist_ok=True)
    for file in (Path(__file__).parent / "configs/tiny_model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)  # knows its special tokens only
    tokenizer = tokenizer.train_new_from_iterator(texts, vocab_size=372, show_progress=False)
    marks = ("thinking", "/thinking", "answer", "/answer", *TAGS.values())
    tokenizer.add_tokens([f"<{mark}>" for mark in marks])  # not special: a decoded text keeps them
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    config = transformers.AutoConfig.from_pretrained(folder)
    config.text_config.vocab_size = len(tokenizer)
    model = transformers.Qwen3VLForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    torch.nn.init.normal_(model.model.visual.pos_embed.weight, std=0.5)
    return model

def warm_up(model, processor, phantoms, rng, iterations):
    """Supervised steps on 32 phantoms each; 60 % of the lessons teach the habit."""
    lessons = [(data.prompt_ids(processor, "{question}", KINDS[p["asked"]][0], [(1, 4, 4)]),
                processor.tokenizer.encode(response(p, habitual)))
               for habitual in (False, True) for p in phantoms]  # all true ones, then all habits
    ids = pad_sequence([torch.tensor(prompt + reply) for prompt, reply in lessons], True)
    labels = pad_sequence([torch.tensor([-100] * len(prompt) + reply) for prompt, reply in lessons],
                          True, padding_value=-100)
    pixels = data.patches([p["image"] for p in phantoms], processor).unflatten(0, (-1, 16))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    for i in trange(iterations, desc="warm-up", mininterval=1):
        seen = rng.choice(len(phantoms), 32, replace=False)
        rows = seen + len(phantoms) * (rng.random(32) < 0.6)  # anew, or they are learnt by heart
        loss = model(ids[rows], labels=labels[rows], pixel_values=pixels[seen].flatten(0, 1),
                     image_grid_thw=torch.tensor([[1, 4, 4]] * 32),
                     mm_token_type_ids=(ids[rows] == processor.image_token_id).int()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (i + 1) / 20) * (1 - 0.9 * i / iterations)
        optimizer.step()
        optimizer.zero_grad()
    print(f"warm-up loss {loss.item():.3f}")

def main():
    parser = argparse.ArgumentParser()
    for name, value in dict(out=Path("out/tiny_start"), seed=1, rows=4096, iterations=600).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    args = parser.parse_args()
    done, settings = args.out / "done.json", str([args.seed, args.rows, args.iterations])
    if done.exists() and done.read_text() == settings:
        return print(f"{args.out} is complete already; delete it to build it again")
    (args.out / "data").mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # so small that two gain a third when idle, and lose tenfold when not
    train = [phantom(1, args.seed, i) for i in range(args.rows)]
    write_rows(args.out / "data/train.parquet", train)
    write_rows(args.out / "data/val.parquet", [phantom(0, i) for i in range(512)])  # for any seed
    model = build(args.out / "model", (KINDS[p["asked"]][0] + response(p) for p in train))
    processor, rng = data.load_processor(args.out / "model"), np.random.default_rng(args.seed)
    warm_up(model, processor, train, rng, args.iterations)
    model.save_pretrained(args.out / "model")
    done.write_text(settings)  # last, so that an interrupted run is done again

if __name__ == "__main__":
    main()
