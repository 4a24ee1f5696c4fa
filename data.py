"""Rows -> prompts: reads the data, checks every row before training starts, prepares ids, pixels.

One record. In parquet an image is bytes; in .json / .jsonl a path relative to that file, a list of
paths, or missing. `images` will do for `image`:
    {"problem": "Is there a pleural effusion?", "solution": "<X_RAY> Yes, on the left.",
     "image": [{"bytes": b"\\xff\\xd8\\xff...", "path": "chest.jpg"}]}
What training gets for it, prompt(data, i); one image pad id per merge x merge patches:
    {"row": i, "problem": "Is ...", "solution": "<X_RAY> ...", "ids": [151644, 872, ...],
     "images": [uint8 array (384, 512, 3)], "grid": [(1, 24, 32)]}        # 24 * 16 x 32 * 16 pixels
"""

import functools
import hashlib
import io
import json
import os
import re
import struct
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.auto.image_processing_auto import get_image_processor_config
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF orientation -> Image.Transpose, upright
BROKEN = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, struct.error,
          Image.DecompressionBombError)  # what Pillow raises for broken files, format by format


class BadRow(ValueError):
    """A row that cannot be used: "row 7, image: the reason"."""


def refuse_local(path):
    """ValueError if a path that is not there is meant as a local one: a typo never asks the hub."""
    if path[:1] in ("", ".", "/") or path.count("/") != 1 or os.path.isdir(os.path.dirname(path)):
        raise ValueError(f"{path!r} does not exist: correct the path or give a hub org/name")


def load_processor(model):
    """Folder or hub id -> tokenizer and vision settings; ValueError names what is missing."""
    if not os.path.isdir(model):
        refuse_local(model)
    elif not Path(model, "tokenizer.json").is_file():  # transformers would make an empty one
        raise ValueError(f"model {model} lacks tokenizer.json: copy from the original model")
    try:
        config = transformers.AutoConfig.from_pretrained(model)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        tokenizer.get_chat_template()  # raises if there is none
        pixels, vision = get_image_processor_config(model), config.vision_config
        return SimpleNamespace(
            tokenizer=tokenizer, image_token_id=config.image_token_id, patch=vision.patch_size,
            merge=vision.spatial_merge_size, temporal=vision.temporal_patch_size,
            mean=pixels["image_mean"], std=pixels["image_std"])
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"model {model} is no complete Qwen-VL folder or hub id (config.json, chat"
                         f" template, preprocessor_config.json): {error!s:.200}") from error


def read_template(text_or_path):
    """A text with {question} once, or its path. MediX-R1 trains without one if it is misspelt."""
    text = text_or_path = str(text_or_path)
    if "{question}" not in text and os.path.isfile(text):
        text = Path(text).read_text(encoding="utf-8").strip()
    if text.count("{question}") != 1:
        raise ValueError(f"prompt_template {text_or_path[:99]!r} must be a text with {{question}} "
                         f"once, or the path of such a file; found {text.count('{question}')}")
    return text


def local_files(path, split):
    """A file, or the files of a split in a folder or in a clone of a hub data set."""
    splits, shards = {} if path.is_dir() else {"train": [path]}, {"train": 1}
    for file in sorted([*path.glob("*"), *path.glob("data/*")]):
        name = re.fullmatch(r"([\w-]+?)(-\d+-of-(\d+)[\w-]*)?\.(parquet|jsonl?)", file.name)
        if name:
            splits.setdefault(name[1], []).append(file)
            shards[name[1]] = int(name[3] or 1)
    # MediX-R1 takes train for any split of a folder, and so validates on what it trains on.
    if split not in splits:
        raise ValueError(f"no split {split!r} there, but: {', '.join(splits) or 'no data'}")
    if len(splits[split]) != shards[split]:  # half a download, or train.parquet and train.jsonl
        raise ValueError(f"split {split} has {len(splits[split])} files, not {shards[split]}")
    return [str(file) for file in splits[split]]


def read_rows(source):
    """Path or hub name, "@split" or not (train) -> memory-mapped Dataset and its images' folder.

    ValueError: no such path, split or column; no rows."""
    source = str(source)
    path, _, split = source.rpartition("@")
    if not path or "/" in split or os.path.exists(source):
        path, split = source, "train"
    try:
        if os.path.exists(path):
            files = local_files(Path(path), split)
            kind = "parquet" if files[0].endswith(".parquet") else "json"
            rows = datasets.load_dataset(kind, data_files=files, keep_in_memory=False)["train"]
        else:
            refuse_local(path)
            rows = datasets.load_dataset(path, split=split, keep_in_memory=False)
    except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"cannot read {source} (empty?): {error.__cause__ or error}") from error
    if not {"problem", "solution"} <= set(rows.column_names) or not len(rows):
        raise ValueError(f"{source} needs rows with the columns problem and solution; it has "
                         f"{len(rows)} rows and the columns {', '.join(rows.column_names)}")
    info = rows.info.copy()
    for name, kind in rows.features.items():
        if isinstance(getattr(kind, "feature", kind), datasets.Image):
            raw = datasets.Image(decode=False)  # cast_column() would write a column of lists anew
            info.features[name] = type(kind)(raw) if hasattr(kind, "feature") else raw
    folder = os.path.abspath(path if os.path.isdir(path) else os.path.dirname(path))
    return datasets.Dataset(rows.data, info=info), folder


def read_row(rows, i, folder):
    """-> problem, solution, images: a list of {"bytes", "path"}, whatever form the column has."""
    images = (row := rows[i]).get("image", row.get("images"))
    images = images if isinstance(images, list) else [] if images is None else [images]
    images = [x if isinstance(x, dict) else {"path": x} for x in images]
    images = [{"bytes": x.get("bytes"), "path": os.path.join(folder, str(x.get("path")))}
              for x in images]
    return row["problem"], row["solution"], images


def opened(image):
    """{"bytes", "path"} -> PIL image, pixels unread, its size when upright, and its EXIF turn."""
    picture = Image.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"])
    # Pillow turns a TIFF itself; the PNG plugin's own getexif() would read the pixels.
    turn = picture.format != "TIFF" and Image.Image.getexif(picture).get(274)
    return picture, picture.size[::-1] if turn in (5, 6, 7, 8) else picture.size, turn


def decode(image):
    """{"bytes", "path"} -> upright RGB PIL image, not resized. Raises one of BROKEN."""
    picture, _, turn = opened(image)
    size = picture.size
    picture.load()
    if picture.size != size:
        raise ValueError(f"the header says {size}, the pixels {picture.size}")
    if picture.mode[0] in "IF":  # over 8 bits: convert("RGB") would turn all above 255 white
        values = np.asarray(picture).astype(np.float64)
        low, high = (f(values[np.isfinite(values)]) for f in (np.min, np.max))
        values = np.nan_to_num(np.clip((values - low) / ((high - low) or 1), 0, 1)) * 255
        picture = Image.fromarray(values.round().astype(np.uint8))
    elif picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", size, "white"), picture)
    picture = picture.convert("RGB")  # before any resize: a palette would be resized by nearest
    return picture.transpose(TURNS[turn]) if turn in TURNS else picture


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
    before, after = template.split("{question}")
    texts = [[{"type": "text", "text": text}] if text else [] for text in (before, problem + after)]
    content = [*texts[0], *[{"type": "image"}] * len(grids), *texts[1]]
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    ids, pad = processor.tokenizer.encode(text, add_special_tokens=False), processor.image_token_id
    assert ids.count(pad) == len(grids), (
        f"the templates give {ids.count(pad)} image pads for {len(grids)} images")
    pads = iter([t * h * w // processor.merge**2 for t, h, w in grids])
    return [x for token in ids for x in ([pad] * next(pads) if token == pad else [token])]


def check_row(i, row, processor, cfg, tags):
    """-> [the prompt's length in tokens, a hash of question and images], or what is wrong with the
    row. Decodes no pixels."""
    problem, solution, images = row
    if not isinstance(problem, str) or not problem.strip():
        return f"row {i}, problem: no text: {problem!r}"
    for token in processor.tokenizer.added_tokens_decoder.values():
        if token.special and token.content in problem:
            return f"row {i}, problem: {token.content} would forge the structure of the chat"
    if not isinstance(solution, str) or not re.match(rf"<({'|'.join(tags)})>\s*\S", solution):
        return f"row {i}, solution: not '<TAG> answer' with a known tag: {str(solution)[:60]!r}"
    digest = hashlib.sha256(problem.encode())
    try:
        for image in images:
            digest.update(image["bytes"] or Path(image["path"]).read_bytes())
        sizes = [opened(image)[1] for image in images]
        grids = grids_of(sizes, processor, cfg.min_pixels, cfg.max_pixels)
    except BROKEN as error:
        return f"row {i}, image: {error}".split(" <_io")[0]  # without a memory address
    return [len(prompt_ids(processor, cfg.prompt_template, problem, grids)), digest.hexdigest()]


def load(source, processor, cfg, tags, rank=0, world=1, gather=lambda value: [value]):
    """Checks every row; each rank every world-th, gather(value) -> [each rank's value].

    cfg: .prompt_template (a text), .max_prompt_tokens, .min_pixels, .max_pixels, .max_bad_rows.
    -> rows, keep [row], hashes [of question and images], lengths {kept row: prompt tokens}, bad
    ["row 7, image: ..."], too_long [row], fingerprint (of the files and the kept rows). ValueError
    on all ranks: too many rows are bad, or none is left. A check without bad rows is cached."""
    def spread(work, items):  # -> [work(item)] on all ranks
        parts = gather([work(item) for item in items[rank::world]])
        return [parts[i % world][i // world] for i in range(len(items))]

    rows, folder = read_rows(source)
    files = [Path(__file__), *(Path(file["filename"]) for file in rows.cache_files)]
    digests = spread(lambda file: hashlib.sha256(np.memmap(file, mode="r")).hexdigest(), files)
    key = _sha256([
        digests, folder, processor.tokenizer.backend_tokenizer.to_str(), cfg.prompt_template, tags,
        processor.tokenizer.chat_template, processor.image_token_id, processor.patch,
        processor.merge, cfg.min_pixels, cfg.max_pixels])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "nanomedix",
                 f"{key[:32]}.json")
    try:
        found = json.loads(cache.read_text())
    except (OSError, ValueError):  # none there, or cut off by a full disk: check again
        found = None
    if not all(gather(found is not None)):  # all ranks or none, or some would wait in spread()
        found = spread(lambda i: check_row(i, read_row(rows, i, folder), processor, cfg, tags),
                       range(len(rows)))
        if rank == 0 and all(isinstance(x, list) for x in found):
            cache.parent.mkdir(parents=True, exist_ok=True)
            aside = cache.with_suffix(f".{os.getpid()}")
            aside.write_text(json.dumps(found))
            aside.rename(cache)  # in one step: another run may be reading
    bad = [x for x in found if isinstance(x, str)]
    lengths = {i: x[0] for i, x in enumerate(found) if isinstance(x, list)}
    too_long = [i for i, n in lengths.items() if n > cfg.max_prompt_tokens]
    lengths = {i: n for i, n in lengths.items() if n <= cfg.max_prompt_tokens}
    if len(bad) > cfg.max_bad_rows * len(rows) or not lengths:
        raise ValueError(
            f"{source}: {len(bad)} of {len(rows)} rows are bad, max_bad_rows={cfg.max_bad_rows} "
            f"allows {int(cfg.max_bad_rows * len(rows))}; {len(too_long)} are longer than "
            f"max_prompt_tokens={cfg.max_prompt_tokens}. Mend them, or raise these. "
            f"{'; '.join(bad[:5])}")
    return SimpleNamespace(
        rows=rows, folder=folder, keep=list(lengths), lengths=lengths, bad=bad, too_long=too_long,
        fingerprint=_sha256([digests[1:], list(lengths)]), processor=processor, cfg=cfg,
        hashes=[found[i][1] for i in lengths])


def _sha256(facts):
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def prompt(data, i):
    """Row i -> the dict shown at the top, its images resized. BadRow: pixels unreadable."""
    problem, solution, images = read_row(data.rows, i, data.folder)
    try:
        pictures = [decode(image) for image in images]
    except BROKEN as error:
        raise BadRow(f"row {i}, image: {error}".split(" <_io")[0]) from error
    grid = grids_of([picture.size for picture in pictures], data.processor, data.cfg.min_pixels,
                    data.cfg.max_pixels)
    ids = prompt_ids(data.processor, data.cfg.prompt_template, problem, grid)
    if len(ids) != data.lengths[i]:
        raise BadRow(f"row {i}, image: changed, {len(ids)} tokens instead of {data.lengths[i]}")
    patch = data.processor.patch
    images = [np.array(picture.resize((w * patch, h * patch), Image.Resampling.BICUBIC))
              for picture, (_, h, w) in zip(pictures, grid)]
    return {"row": i, "problem": problem, "solution": solution, "ids": ids, "images": images,
            "grid": grid}


def patches(images, processor, device="cpu"):
    """[(H, W, 3) uint8] -> (N, 3 * temporal * patch**2) float32, as Qwen's image processor."""
    p, m, t = processor.patch, processor.merge, processor.temporal
    mean = torch.tensor(processor.mean, device=device)[:, None, None]
    std = torch.tensor(processor.std, device=device)[:, None, None]
    rows = [torch.empty(0, 3 * t * p * p, device=device)]
    for image in images:
        x = (torch.from_numpy(image).to(device).permute(2, 0, 1) / 255 - mean) / std  # (3, H, W)
        x = x.reshape(3, x.shape[1] // (m * p), m, p, x.shape[2] // (m * p), m, p)
        x = x.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5)  # (H / mp, W / mp, m, m, 3, 1, p, p)
        rows.append(x.expand(-1, -1, -1, -1, -1, t, -1, -1).reshape(-1, 3 * t * p * p))
    return torch.cat(rows)


@functools.lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    """-> permutation of range(n), from seed and epoch alone: there is no state to lose."""
    return tuple(np.random.default_rng([seed, epoch]).permutation(n).tolist())


def order(n, seed, cursor, k):
    """-> the k positions of n after the first `cursor`, each epoch in an order of its own."""
    return [permutation(n, seed, c // n)[c % n] for c in range(cursor, cursor + k)]
