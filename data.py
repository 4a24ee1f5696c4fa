"""Rows -> prompts: reads the data, checks every row before training starts, prepares ids, pixels.
A record. `image` or `images`: bytes in parquet; in JSON a path relative to the file; a list; none:
    {"problem": "Which side?", "solution": "<X_RAY> Left.", "image": [{"bytes": b"\\xff\\xd8..."}]}
What training gets for it, prompt(data, i); one image pad id per merge x merge patches:
    {"row": i, "problem": "Which side?", "solution": "<X_RAY> Left.", "ids": [151644, 872, ...],
     "images": [uint8 array (384, 512, 3)], "grid": [(1, 24, 32)]}"""  # 24 * 16 x 32 * 16 pixels
import hashlib
import io
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import torch
import transformers
from PIL import Image, ImageOps
from transformers.models.auto.image_processing_auto import get_image_processor_config
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

FORMATS = "BMP GIF JPEG JPEG2000 PNG PPM TIFF WEBP".split()  # EPS would start Ghostscript

def is_local(path):
    """Whether a path is there, not on the hub. ValueError for a typo in one meant to be there."""
    there, folder = os.path.exists(path), os.path.isdir(os.path.dirname(path))
    if not there and (path[:1] in ("", ".", "/") or path.count("/") != 1 or folder):
        raise ValueError(f"{path!r} does not exist: correct the path or give a hub org/name")
    return there

def load_processor(model):
    """Folder or hub id -> tokenizer and vision settings; ValueError names what is missing."""
    if is_local(model) and not Path(model, "tokenizer.json").is_file():  # else an empty one is made
        raise ValueError(f"model {model} lacks tokenizer.json: copy from the original model")
    try:
        config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        tokenizer.get_chat_template()  # raises if there is none
        pixels, vision = get_image_processor_config(model), config.vision_config
        return SimpleNamespace(
            tokenizer=tokenizer, image_token_id=config.image_token_id, mean=pixels["image_mean"],
            std=pixels["image_std"], patch=vision.patch_size, merge=vision.spatial_merge_size,
            temporal=vision.temporal_patch_size)
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"model {model} is no complete Qwen-VL folder or hub id (config.json, chat"
                         f" template, preprocessor_config.json): {error!s:.200}") from error

def read_template(given):
    """A text with {question} once, or its path. MediX-R1 trains without one if it is misspelt."""
    text = Path(given).read_text("utf-8").strip() if os.path.isfile(given) else given
    if (n := text.count("{question}")) != 1:
        raise ValueError(f"prompt_template {given[:99]!r} must be a text with {{question}} once, "
                         f"or the path of such a file; found {n}")
    return text

def local_files(path, split):
    """A file, or the files of a split in a folder or in a clone of a hub data set."""
    form = re.escape(split) + r"(-\d+-of-(\d+)[\w-]*)?\.(parquet|jsonl?)"
    there = [path] if path.is_file() else sorted([*path.glob("*"), *path.glob("data/*")])
    files = {str(path): 1} if path.is_file() and split == "train" else {  # 1: how many belong to it
        str(file): int(m[2] or 1) for file in there if (m := re.fullmatch(form, file.name))}
    if len(files) != (n := max(files.values(), default=1)):  # half a download; .parquet and .jsonl
        raise ValueError(f"split {split!r}: {len(files)} files, not {n}: {[x.name for x in there]}")
    return [*files]

def read_rows(source, columns=("problem", "solution"), subsets=(None,)):
    """Path or hub name, "@split" or not (train) -> memory-mapped Dataset and its images' folder.
    Its rows need the columns; subsets are configurations of a hub data set, joined."""
    source = str(source)
    path, _, split = source.rpartition("@")
    if not path or "/" in split or os.path.exists(source):
        path, split = source, "train"
    try:
        if is_local(path):
            files = local_files(Path(path), split)
            kind = "parquet" if files[0].endswith(".parquet") else "json"
            rows = datasets.load_dataset(kind, data_files=files, keep_in_memory=False)["train"]
        else:
            rows = datasets.concatenate_datasets([datasets.load_dataset(
                path, subset, split=split, keep_in_memory=False) for subset in subsets])
    except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"cannot read {source} (empty?): {error.__cause__ or error}") from error
    if not {*columns} <= {*rows.column_names} or not len(rows):
        raise ValueError(f"{source} needs rows with the columns {' and '.join(columns)}; it has "
                         f"{len(rows)} rows and the columns {', '.join(rows.column_names)}")
    table = rows.data.replace_schema_metadata(None)  # by which datasets would open images, or URLs
    return datasets.Dataset(table), os.path.abspath(path if os.path.isdir(path) else path + "/..")

def decode(image):
    """{"bytes": a file's} -> upright RGB PIL image, not resized."""
    picture = Image.open(io.BytesIO(image["bytes"]), formats=FORMATS)
    ImageOps.exif_transpose(picture, in_place=True)  # reads the pixels, too
    if picture.mode[0] in "IF":  # over 8 bits: convert("RGB") would turn all above 255 white
        values = np.asarray(picture).astype(np.float64)
        low, high = (f(values[np.isfinite(values)]) for f in (np.min, np.max))
        values = np.nan_to_num(np.clip((values - low) / ((high - low) or 1), 0, 1)) * 255
        picture = Image.fromarray(values.round().astype(np.uint8))
    elif picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")  # before any resize: a palette would be resized by nearest

def grids_of(sizes, processor, min_pixels, max_pixels):
    """(width, height) of each image of a row, sharing max_pixels -> [(1, h, w)] in patches.
    Qwen's rule, in whole merge blocks; ValueError for sides beyond 200 : 1."""
    patch, block = processor.patch, processor.patch * processor.merge
    most = max(max_pixels // max(len(sizes), 1), block**2)
    least = max(min(min_pixels, most), block**2)
    grids = [smart_resize(height, width, block, least, most) for width, height in sizes]
    return [(1, height // patch, width // patch) for height, width in grids]

def prompt_ids(processor, template, problem, grids):
    """-> ids of one user turn, no system message: template, images, question, rest of template."""
    (before, after), pad = template.split("{question}"), processor.image_token_id
    content = [{"type": "text", "text": before}, *[{"type": "image"}] * len(grids),
               {"type": "text", "text": problem + after}]
    ids = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, return_dict=False)
    assert ids.count(pad) == len(grids), f"{ids.count(pad)} image pads for {len(grids)} images"
    pads = iter([t * h * w // processor.merge**2 for t, h, w in grids])
    return [x for token in ids for x in ([pad] * next(pads) if token == pad else [token])]

def read_row(data, i):
    """Row i -> prompt(data, i) with images of their own size, and a hash of question and images.
    ValueError, like "row 7, image: the reason": the row cannot be used."""
    row, processor, cfg = data.rows[i], data.processor, data.cfg
    problem, solution, images = row["problem"], row["solution"], row.get("image", row.get("images"))
    if not isinstance(problem, str) or not problem.strip():
        raise ValueError(f"row {i}, problem: no text: {problem!r}")
    for token in processor.tokenizer.added_tokens_decoder.values():
        if token.special and token.content in problem:
            raise ValueError(f"row {i}, problem: {token.content} would forge the chat's structure")
    if not re.match(rf"<({'|'.join(data.tags)})>[\s.]*[^\s.]", str(solution)):
        raise ValueError(f"row {i}, solution: not '<TAG> answer', a known tag: {solution!r:.60}")
    images = images if isinstance(images, list) else [] if images is None else [images]
    images = [x if isinstance(x, dict) else {"path": x} for x in images]
    try:
        paths = [None if x.get("bytes") else Path(data.folder, str(x["path"])) for x in images]
        if odd := [p for p in paths if p and p.exists() and not p.is_file()]:
            raise ValueError(f"{odd[0]} is no file")  # but a device, which might never end
        files = [x.get("bytes") or p.read_bytes() for x, p in zip(images, paths)]
        sizes = [Image.open(io.BytesIO(file), formats=FORMATS).size for file in files]
        if sum(width * height for width, height in sizes) > 2**26:
            raise ValueError(f"sizes {sizes}, above {2**26} pixels a row: make them smaller")
        pictures = [decode({"bytes": file}) for file in files]
        grid = grids_of([x.size for x in pictures], processor, cfg.min_pixels, cfg.max_pixels)
    except Exception as error:  # Pillow raises a dozen kinds, by format and damage
        reason = str(error).split(" <_io")[0]  # without a memory address
        raise ValueError(f"row {i}, image: {type(error).__name__}: {reason}") from error
    ids = prompt_ids(processor, cfg.prompt_template, problem, grid)
    return {"row": i, "problem": problem, "solution": solution, "ids": ids, "images": pictures,
            "grid": grid}, hashlib.sha256(problem.encode() + b"".join(files)).hexdigest()

def load(source, processor, cfg, tags, rank=0, world=1, gather=lambda value: [value]):
    """Checks every row, pixels included; each rank every world-th, gather(value) -> [each rank's].
    -> rows, keep [row], kept {row: (tokens, hash of question and images, solution)}, hashes, bad
    ["row 7, image: ..."], too_long [row], fingerprint. ValueError: too many are bad, none left."""
    rows, folder = read_rows(source)
    data = SimpleNamespace(rows=rows, folder=folder, processor=processor, cfg=cfg, tags=tags)
    mine = []  # of each row what to keep or, as a text, what is wrong with it
    for i in range(rank, len(rows), world):
        try:
            row, digest = read_row(data, i)
            mine.append((len(row["ids"]), digest, row["solution"]))
        except ValueError as error:
            mine.append(str(error))
    parts = gather(mine)
    found = [parts[i % world][i // world] for i in range(len(rows))]
    good = {i: x for i, x in enumerate(found) if not isinstance(x, str)}
    kept = {i: x for i, x in good.items() if x[0] <= cfg.max_prompt_tokens}
    bad, too_long = [x for x in found if isinstance(x, str)], [i for i in good if i not in kept]
    if len(bad) > cfg.max_bad_rows * len(rows) or not kept:
        raise ValueError(f"{source}: {len(bad)} of {len(rows)} rows are bad, max_bad_rows="
                         f"{cfg.max_bad_rows}; {len(too_long)} are longer than max_prompt_tokens="
                         f"{cfg.max_prompt_tokens}. Mend or raise these. {'; '.join(bad[:5])}")
    content = json.dumps([x[1:] for x in kept.values()]).encode()
    return SimpleNamespace(
        **vars(data), kept=kept, keep=[*kept], hashes=[x[1] for x in kept.values()], bad=bad,
        too_long=too_long, fingerprint=hashlib.sha256(content).hexdigest())

def prompt(data, i):
    """Row i, one of .keep -> the dict shown at the top. ValueError: changed since load()."""
    row, digest = read_row(data, i)
    if digest != data.kept[i][1]:
        raise ValueError(f"row {i}: its file changed after the start: mend it and start again")
    p = data.processor.patch
    row["images"] = [np.array(image.resize((w * p, h * p), Image.Resampling.BICUBIC))
                     for image, (_, h, w) in zip(row["images"], row["grid"])]
    return row

def patches(images, processor, device="cpu"):
    """[(H, W, 3) uint8] -> (N, 3 * temporal * patch**2) float32, as Qwen's image processor."""
    p, m, t = processor.patch, processor.merge, processor.temporal
    mean, std = (torch.tensor(x, device=device)[:, None, None]
                 for x in (processor.mean, processor.std))
    rows = []
    for image in images:
        x = (torch.from_numpy(image).to(device).permute(2, 0, 1) / 255 - mean) / std  # (3, H, W)
        x = x.reshape(3, x.shape[1] // (m * p), m, p, x.shape[2] // (m * p), m, p)
        x = x.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5)  # (H / mp, W / mp, m, m, 3, 1, p, p)
        rows.append(x.expand(-1, -1, -1, -1, -1, t, -1, -1).reshape(-1, 3 * t * p * p))
    return torch.cat(rows)

def order(rows, seed, cursor, k):
    """The k rows after the first `cursor`; seed and epoch alone decide their order."""
    n = len(rows)
    orders = [np.random.default_rng([seed, epoch]).permutation(n)
              for epoch in range(cursor // n, (cursor + k) // n + 1)]
    return [rows[i] for i in np.concatenate(orders)[cursor % n:][:k]]
