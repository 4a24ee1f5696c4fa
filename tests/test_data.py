"""data.py on drawn images and, where it is there, the real data beside the checkout."""
import io
import json
import pickle
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from data_fixtures import CHAT, TAGS, encoded, noise, row, write_processor
from PIL import Image, PngImagePlugin
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import data

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
TEMPLATE = "Look at this first.\n{question}\nAnswer briefly."
LIMITS = {"max_prompt_tokens": 4096, "min_pixels": 64 * 64, "max_pixels": 512 * 512,
          "max_bad_rows": 1.0}
real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data at {REAL}")


@pytest.fixture(scope="session", params=[14, 16])
def either(request, tmp_path_factory):
    return data.load_processor(write_processor(tmp_path_factory.mktemp("model"), request.param))


@pytest.fixture(scope="session")
def processor(tmp_path_factory):
    return data.load_processor(write_processor(tmp_path_factory.mktemp("model"), 16))


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


def parquet(path, rows):
    """Plain pyarrow: no Hugging Face metadata in the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def stored(content, path=None):
    return {"bytes": content, "path": path}


def jsonl(path, rows):
    path.write_text("\n".join(json.dumps(x) for x in rows))
    return str(path)


def named(bad):
    """["row 7, image: reason"] -> [(7, "image")]."""
    return [(int(x.split(",")[0][4:]), x.split(", ")[1].split(":")[0]) for x in bad]


def load(source, processor, template=TEMPLATE, **more):
    limits = {k: more.pop(k, v) for k, v in LIMITS.items()}
    cfg = SimpleNamespace(prompt_template=template, **limits)
    return data.load(source, processor, cfg, more.pop("tags", TAGS), **more)


def lengths(loaded):
    return {i: tokens for i, (tokens, _, _) in loaded.kept.items()}


def reference(processor, **more):
    return Qwen2VLImageProcessorPil(
        patch_size=processor.patch, merge_size=processor.merge, image_mean=processor.mean,
        image_std=processor.std, **more)


# processor and template

def test_processor_facts(either):
    assert either.merge == either.temporal == 2 and either.patch in (14, 16)
    assert either.tokenizer.convert_ids_to_tokens(either.image_token_id) == "<|image_pad|>"


@pytest.mark.parametrize("name, said", [
    ("config.json", "config.json"), ("tokenizer.json", "lacks tokenizer.json: copy"),
    ("chat_template.jinja", "chat_template is not set"),
    ("preprocessor_config.json", "preprocessor_config.json.*image_mean")])
def test_processor_names_what_is_missing(tmp_path, name, said):
    folder = write_processor(tmp_path, 16)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=said) as error:
        data.load_processor(folder)
    assert "\n" not in str(error.value) and folder in str(error.value)


@pytest.mark.parametrize("path", ["./no", "/no/such", "a/b/c", "tests/no_such", "rows.parquet"])
def test_missing_local_paths_never_ask_the_hub(path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    for read in (data.load_processor, data.read_rows):
        with pytest.raises(ValueError, match="does not exist"):
            read(path)


def test_template(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("Q: {question}\n")
    assert data.read_template(file) == data.read_template("Q: {question}") == "Q: {question}"
    file.write_text("no place")
    for wrong in (str(file), "no/such/file.txt", "plain text", "{question} {question}", "x" * 5000):
        with pytest.raises(ValueError, match="once"):
            data.read_template(wrong)


# prompts: ids and grids

@pytest.mark.parametrize("sizes", [[], [(100, 70)], [(37, 300), (800, 611)], [(9, 9)], [(3000, 20)],
                                   [(64, 96)]])
def test_prompt_is_the_real_thing(either, tmp_path, sizes):
    """Ids and pixels against transformers' image processor, run on the original image."""
    images = [noise(*size, seed=i) for i, size in enumerate(sizes)]
    loaded = load(parquet(tmp_path / "a.parquet", [row(*images)]), either)
    got = data.prompt(loaded, 0)
    share = LIMITS["max_pixels"] // max(len(images), 1)
    truth = reference(either, min_pixels=LIMITS["min_pixels"], max_pixels=share)
    truth = truth(images, return_tensors="pt") if images else {"image_grid_thw": torch.empty(0, 3)}
    grid = [tuple(int(x) for x in g) for g in truth["image_grid_thw"]]
    pads = [g[1] * g[2] // 4 for g in grid]
    text = ("<|im_start|>user\nLook at this first.\n"
            + "".join(f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for n in pads)
            + "Is there a pleural effusion?\nAnswer briefly.<|im_end|>\n<|im_start|>assistant\n")
    assert got["grid"] == grid
    assert got["ids"] == either.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert lengths(loaded)[0] == len(got["ids"])
    assert got["ids"].count(either.image_token_id) == sum(pads)
    assert [x.shape for x in got["images"]] == [(h * either.patch, w * either.patch, 3)
                                                for _, h, w in grid]
    assert all(x.dtype == np.uint8 for x in got["images"])
    if images:
        torch.testing.assert_close(data.patches(got["images"], either), truth["pixel_values"],
                                   atol=1e-5, rtol=0)


def test_images_share_max_pixels(processor, tmp_path):
    images = [noise(600, 600, i) for i in range(4)]
    loaded = load(parquet(tmp_path / "a.parquet", [row(*images)]), processor, min_pixels=400 * 400)
    assert sum(h * w * 16 * 16 for _, h, w in data.prompt(loaded, 0)["grid"]) <= 512 * 512


def test_tiny_max_pixels_still_gives_one_block_an_image(processor, tmp_path):
    source = parquet(tmp_path / "a.parquet", [row(noise(50, 50), noise(9, 9))])
    loaded = load(source, processor, min_pixels=0, max_pixels=1024)
    assert data.prompt(loaded, 0)["grid"] == [(1, 2, 2), (1, 2, 2)]


def test_image_in_text_is_text(processor, tmp_path):
    source = parquet(tmp_path / "a.parquet", [row(noise(64, 64), problem="Is <image> an image?")])
    ids = data.prompt(load(source, processor), 0)["ids"]
    assert ids.count(processor.image_token_id) == 4  # a 64 x 64 image, and no more
    assert "Is <image> an image?" in processor.tokenizer.decode(ids)


def test_chat_template_without_images_is_refused(processor, tmp_path):
    folder = write_processor(tmp_path, 16)
    (tmp_path / "chat_template.jinja").write_text(CHAT.replace("<|image_pad|>", ""))
    with pytest.raises(AssertionError, match="0 image pads for 1 images"):
        load(parquet(tmp_path / "a.parquet", [row(noise(64, 64))]), data.load_processor(folder))


# images

def gray16(low, high, size=64):
    return np.linspace(low, high, size * size).reshape(size, size).astype(np.uint16)


@pytest.mark.parametrize("high", [4095, 65535, 200])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_gray_keeps_its_range(high, kind):
    got = np.asarray(data.decode(stored(encoded(Image.fromarray(gray16(0, high)), kind))))
    assert got.shape == (64, 64, 3) and got.min() == 0 and got.max() == 255
    truth = gray16(0, high) / high * 255
    assert np.abs(got[..., 0] - truth).max() < 1


@pytest.mark.parametrize("values", [np.full((8, 8), 900, np.uint16), np.full((8, 8), -3, np.int32)])
def test_constant_image(values):
    with np.errstate(all="raise"):  # no division by zero
        got = np.asarray(data.decode(stored(encoded(Image.fromarray(values), "TIFF"))))
    assert got.shape == (8, 8, 3) and len(np.unique(got)) == 1


def test_float_image_with_holes():
    values = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)
    values[0, 0], values[0, 1] = np.nan, np.inf
    got = np.asarray(data.decode(stored(encoded(Image.fromarray(values), "TIFF"))))
    assert got[7, 7, 0] == 255 and 120 < got[4, 0, 0] < 135


def turning(kind, tag):
    """What to save an image of a kind with, so that it is shown turned by `tag`."""
    exif = Image.Exif()
    exif[274] = tag
    return {"tiffinfo": {274: tag}} if kind == "TIFF" else {"exif": exif}


def turned(kind, tag):
    """Left half red, right half blue, 40 x 20, stored as it is, to be shown turned by `tag`."""
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    return encoded(image, kind, **turning(kind, tag))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_exif_orientation(kind, tag):
    got = data.decode(stored(turned(kind, tag)))
    assert got.size == ((20, 40) if tag >= 5 else (40, 20))
    corners = got.getpixel((2, 2)), got.getpixel((got.width - 3, got.height - 3))
    red_first = tag in (1, 4, 5, 6)
    assert [x[0] > 128 for x in corners] == [red_first, not red_first]


def test_png_exif_behind_the_pixels_counts():
    plain, chunk = encoded(noise(40, 20)), io.BytesIO()
    PngImagePlugin.putchunk(chunk, b"eXIf", turning("PNG", 6)["exif"].tobytes()[6:])
    got = data.decode(stored(plain[:-12] + chunk.getvalue() + plain[-12:]))  # before IEND
    assert np.array_equal(got, noise(40, 20).transpose(Image.Transpose.ROTATE_270))


@pytest.mark.parametrize("mode, kind", [
    ("I;16", "PNG"), ("F", "TIFF"), ("P", "PNG"), ("LA", "PNG"), ("1", "PNG"), ("CMYK", "JPEG")])
def test_pixels_of_any_kind_are_turned(mode, kind):
    image = Image.fromarray(gray16(0, 4095)) if mode == "I;16" else noise(40, 20).convert(mode)
    plain, got = (data.decode(stored(encoded(image, kind, **more)))
                  for more in ({}, turning(kind, 6)))
    assert image.mode == mode and len(np.unique(plain)) > 1
    assert np.array_equal(got, plain.transpose(Image.Transpose.ROTATE_270))


def test_transparent_is_white():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 8))
    half = Image.new("LA", (8, 8), (0, 0))
    palette = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) // 8, "P")
    palette.putpalette([1, 2, 3] * 8)
    for file in (encoded(image), encoded(half), encoded(palette, transparency=0)):
        assert data.decode(stored(file)).getpixel((0, 0)) == (255, 255, 255)
    assert data.decode(stored(encoded(palette, transparency=0))).getpixel((7, 7)) == (1, 2, 3)
    assert data.decode(stored(encoded(image))).getpixel((7, 7)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["P", "1", "CMYK", "L"])
def test_resized_as_rgb(mode, processor, tmp_path):
    """A palette or 1-bit image resized before it is RGB has no in-between colours."""
    image = Image.new("RGB", (96, 96), "white")
    image.paste("black", (0, 0, 45, 45))
    image = image.convert(mode)
    file = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    loaded = load(parquet(tmp_path / "a.parquet", [row(file)]), processor, max_pixels=64 * 64)
    got = data.prompt(loaded, 0)["images"][0]
    truth = image.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)
    assert np.array_equal(got, np.asarray(truth)) and len(np.unique(got)) > 2


def test_aspect_ratio_is_bad(processor, tmp_path):
    source = parquet(tmp_path / "a.parquet", [row(noise(64, 64)), row(noise(2010, 10))])
    assert named(load(source, processor).bad) == [(1, "image")]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "GIF", "BMP"])
def test_pixels_that_cannot_be_read_are_named_by_the_check(kind, processor, tmp_path):
    """The headers are all right; nothing is left for the run to find out."""
    file = encoded(noise(200, 200), kind)
    damaged = file[:len(file) // 2]
    assert Image.open(io.BytesIO(damaged)).size == (200, 200)
    loaded = load(parquet(tmp_path / "a.parquet", [row(damaged), row(file)]), processor)
    assert named(loaded.bad) == [(0, "image")] and loaded.keep == [1] == list(loaded.kept)
    assert len(loaded.bad[0]) > len("row 0, image: ")
    assert data.prompt(loaded, 1)["row"] == 1


@pytest.mark.filterwarnings("ignore")
def test_any_damage_is_named(processor, tmp_path):
    """Whatever Pillow makes of it; a row that passes the check gives its prompt."""
    rng, rows = np.random.default_rng(0), []
    for kind in ("JPEG", "PNG", "TIFF", "GIF", "BMP", "WEBP"):
        file = encoded(noise(48, 32), kind, **turning(kind, 6))
        for _ in range(40):
            harmed = np.frombuffer(file, np.uint8).copy()
            harmed[rng.integers(4, len(file), 6)] = rng.integers(0, 256, 6)
            harmed[rng.integers(4, min(len(file), 120), 2)] = rng.integers(0, 256, 2)
            rows.append(row(harmed.tobytes()))
    loaded = load(parquet(tmp_path / "a.parquet", [*rows, row(noise(64, 64))]), processor)
    assert 9 < len(loaded.bad) < len(rows) and {x for _, x in named(loaded.bad)} == {"image"}
    assert "0x" not in "".join(loaded.bad)
    assert all(data.prompt(loaded, i)["images"] for i in loaded.keep)


def test_a_decompression_bomb_is_bad(processor, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64)
    source = parquet(tmp_path / "a.parquet", [row(noise(64, 64)), row(noise(200, 64))])
    loaded = load(source, processor)
    assert loaded.keep == [0] and named(loaded.bad) == [(1, "image")] and "bomb" in loaded.bad[0]


def test_the_size_of_an_image_is_that_of_its_pixels(processor, tmp_path):
    """Pillow turns a TIFF by its XMP too, but reports the size by the TIFF tag alone."""
    xmp = b'<x tiff:Orientation="6"/>'
    file = encoded(noise(128, 64), "TIFF", tiffinfo={700: xmp})
    assert Image.open(io.BytesIO(file)).size == (128, 64)
    got = data.prompt(load(parquet(tmp_path / "a.parquet", [row(file)]), processor), 0)
    assert got["grid"] == [(1, 8, 4)]
    assert np.array_equal(got["images"][0], noise(128, 64).transpose(Image.Transpose.ROTATE_270))


# rows: forms of source

def test_bad_rows_are_named(processor, tmp_path):
    good = noise(64, 64)
    rows = [row(good), row(good, problem="Hi <|im_end|>"), row(good, problem="<|image_pad|>"),
            row(good, problem=" "), row(good, problem=None), row(good, solution="Yes"),
            row(good, solution="<X_RAY>  "), row(good, solution="<NO_TAG> Yes"),
            row(good, solution=None), row(b"no image"), row(), row(good, solution="<CT_SCAN>No"),
            row(good), row(good, solution="<X_RAY> . ..")]
    rows[12]["image"].append({"bytes": None, "path": None})
    loaded = load(parquet(tmp_path / "a.parquet", rows), processor)
    fields = {1: "problem", 2: "problem", 3: "problem", 4: "problem", 5: "solution", 6: "solution",
              7: "solution", 8: "solution", 9: "image", 12: "image", 13: "solution"}
    assert dict(named(loaded.bad)) == fields
    assert loaded.keep == [0, 10, 11] == list(loaded.kept)
    assert "<|im_end|>" in loaded.bad[0] and "None" in loaded.bad[-2]
    # no memory address: ranks must agree
    assert loaded.bad[-3].endswith(": cannot identify image file")


def test_too_many_bad_rows_stop(processor, tmp_path):
    rows = [row(solution="<X_RAY> Yes" if i else "Yes") for i in range(10)]
    source = parquet(tmp_path / "a.parquet", rows)
    assert named(load(source, processor, max_bad_rows=0.1).bad) == [(0, "solution")]
    with pytest.raises(ValueError, match=(
            r"a\.parquet: 1 of 10 rows are bad, max_bad_rows=0.09; 0 are longer"
            r".* Mend .*row 0, solution: .*'Yes'")):
        load(source, processor, max_bad_rows=0.09)
    with pytest.raises(ValueError, match=r"1 of 1 rows are bad, max_bad_rows=1\.0; 0 are"):
        load(parquet(tmp_path / "b.parquet", rows[:1]), processor)


def test_too_long_is_filtered_and_counted(processor, tmp_path):
    source = parquet(tmp_path / "a.parquet", [row(noise(64, 64)), row(noise(512, 512))])
    short, long = lengths(load(source, processor)).values()
    assert long - short == 16 * 16 - 2 * 2
    loaded = load(source, processor, max_prompt_tokens=long - 1)
    assert loaded.too_long == [1] and loaded.keep == [0] and loaded.bad == []
    assert load(source, processor, max_prompt_tokens=long).too_long == []
    with pytest.raises(ValueError, match=(
            f"0 of 2 rows are bad.* 2 are longer than max_prompt_tokens={short - 1}.* raise")):
        load(source, processor, max_prompt_tokens=short - 1)


def test_clone_of_a_hub_data_set(processor, tmp_path):
    a, b, c = (row(noise(64, 64, i), problem=f"Question {i}?") for i in range(3))
    parquet(tmp_path / "data/train-00000-of-00002.parquet", [a])
    parquet(tmp_path / "data/train-00001-of-00002.parquet", [b])
    parquet(tmp_path / "data/test-00000-of-00001.parquet", [c])
    (tmp_path / "README.md").write_text("a data set")
    for source, questions in ((tmp_path, [0, 1]), (f"{tmp_path}@train", [0, 1]),
                              (f"{tmp_path}@test", [2])):
        found = [x["problem"] for x in data.read_rows(source)[0]]
        assert found == [f"Question {i}?" for i in questions]
    with pytest.raises(ValueError, match=r"'nosuch': 0 files, .*test.*train"):
        data.read_rows(f"{tmp_path}@nosuch")
    (tmp_path / "data/train-00000-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match=r"'train': 1 files, not 2"):
        data.read_rows(tmp_path)


def test_folder_file_and_at_sign(tmp_path):
    folder = tmp_path / "me@home"
    train = parquet(folder / "train.parquet", [row(problem="train?")])
    jsonl(folder / "test.jsonl", [{"problem": "test?", "solution": "<X_RAY> a"}])
    for source, problem in ((folder, "train?"), (f"{folder}@test", "test?"), (train, "train?"),
                            (f"{train}@train", "train?")):
        assert data.read_rows(source)[0][0]["problem"] == problem
    with pytest.raises(ValueError, match=r"'test'.*train"):
        data.read_rows(f"{train}@test")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_json_forms_and_relative_paths(processor, tmp_path, name, monkeypatch):
    folder = tmp_path / "here"
    (folder / "scans").mkdir(parents=True)
    for i in range(2):
        noise(64, 64, i).save(folder / f"scans/{i}.png")
    text = {"problem": "Is it?", "solution": "<X_RAY> a"}
    rows = [text | {"image": "scans/0.png"}, text | {"image": ["scans/0.png", "scans/1.png"]}, text,
            text | {"image": None}, text | {"image": []}, text | {"image": "scans/none.png"},
            text | {"solution": 3}, text | {"image": str(folder / "scans/1.png"), "source": "x"}]
    jsonl(folder / name, rows)
    if name == "rows.json":
        (folder / name).write_text(json.dumps(rows, indent=1))
    monkeypatch.chdir(tmp_path)
    loaded = load(f"here/{name}", processor)
    monkeypatch.chdir("/")
    assert loaded.keep == [0, 1, 2, 3, 4, 7]
    assert named(loaded.bad) == [(5, "image"), (6, "solution")]
    assert "none.png" in loaded.bad[0] and loaded.rows[7]["source"] == "x"
    assert [len(data.prompt(loaded, i)["images"]) for i in loaded.keep] == [1, 2, 0, 0, 0, 1]
    assert np.array_equal(data.prompt(loaded, 0)["images"][0], np.asarray(noise(64, 64, 0)))


def test_long_json_that_changes_its_form_is_not_read_wrong(processor, tmp_path):
    """Past 10 MB a path here and a list there become text: named, never trained blind."""
    noise(64, 64).save(tmp_path / "a.png")
    text = {"problem": "Is it?", "solution": "<X_RAY> a", "ballast": "x" * (1 << 20)}
    rows = [text | {"image": "a.png"}] * 24 + [text | {"image": ["a.png"]}]
    loaded = load(jsonl(tmp_path / "a.jsonl", rows), processor)
    assert {*loaded.keep, *(i for i, _ in named(loaded.bad))} == set(range(25)) and loaded.keep
    assert all(len(data.prompt(loaded, i)["images"]) == 1 for i in loaded.keep)


@pytest.mark.parametrize("kind", ["list of structs", "struct", "path", "list of paths", "images"])
def test_plain_parquet_forms_of_the_image_column(processor, tmp_path, kind):
    file, full = encoded(noise(64, 64)), row(noise(64, 64))
    (tmp_path / "a.png").write_bytes(file)
    forms = {"struct": {"bytes": file, "path": "a"}, "path": "a.png", "list of paths": ["a.png"]}
    full["images" if kind == "images" else "image"] = forms.get(kind, full.pop("image"))
    loaded = load(parquet(tmp_path / "a.parquet", [full]), processor)
    assert np.array_equal(data.prompt(loaded, 0)["images"][0], np.asarray(noise(64, 64)))


def test_unusable_files(tmp_path):
    cases = {"empty.jsonl": "", "empty.json": "[]", "broken.jsonl": "{x\n", "rows.csv": "problem,a",
             "pointer.parquet": "version https://git-lfs"}
    for name, text in cases.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=name):
            data.read_rows(tmp_path / name)
    source = parquet(tmp_path / "a.parquet", [{"question": "a", "solution": "b"}])
    with pytest.raises(ValueError, match=r"problem.*question, solution"):
        data.read_rows(source)
    schema = pyarrow.schema([("problem", pyarrow.string()), ("solution", pyarrow.string())])
    pyarrow.parquet.write_table(schema.empty_table(), tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=r"none.parquet"):
        data.read_rows(tmp_path / "none.parquet")


# the check: ranks, fingerprint

def facts(loaded):
    return loaded.kept, loaded.keep, loaded.hashes, loaded.bad, loaded.too_long, loaded.fingerprint


@pytest.fixture
def checked(monkeypatch):
    """The images that are decoded, one entry each."""
    seen, decode = [], data.decode
    monkeypatch.setattr(data, "decode", lambda image: seen.append(image) or decode(image))
    return seen


def test_every_start_checks_every_row(processor, tmp_path, checked):
    """Also images whose files change while the data file that names them stays the same."""
    plain = {"problem": "a?", "solution": "<X_RAY> a"}
    source = jsonl(tmp_path / "a.jsonl", [plain | {"image": x} for x in ("a.png", "b.png", None)])
    noise(64, 64).save(tmp_path / "a.png")
    found = [load(source, processor)]
    assert found[0].keep == [0, 2] and named(found[0].bad) == [(1, "image")]
    noise(64, 64).save(tmp_path / "b.png")
    found += [load(source, processor)]
    assert found[1].keep == [0, 1, 2] and not found[1].bad and len(checked) == 3
    noise(64, 64, seed=1).save(tmp_path / "b.png")
    found += [load(source, processor)]
    assert found[2].keep == [0, 1, 2] and lengths(found[2]) == lengths(found[1])
    assert len({x.fingerprint for x in found}) == 3 and found[2].hashes[1] != found[1].hashes[1]
    assert facts(load(source, processor)) == facts(found[2]) and len(checked) == 7


@pytest.mark.parametrize("change, said", [
    (lambda path: noise(128, 64).save(path), "file changed after the start"),
    (lambda path: noise(64, 64, seed=1).save(path), "file changed after the start"),
    (lambda path: path.write_bytes(path.read_bytes()[:-99]), "truncated"),
    (lambda path: path.unlink(), r"No such file.*a\.png")])
def test_a_file_that_changes_under_the_run(processor, tmp_path, change, said):
    """prompt() does not make do with it, not even with an image of the same size."""
    source = jsonl(tmp_path / "a.jsonl", [
        {"problem": "a?", "solution": "<X_RAY> a", "image": "a.png"}])
    noise(64, 64).save(tmp_path / "a.png")
    loaded = load(source, processor)
    assert np.array_equal(data.prompt(loaded, 0)["images"][0], noise(64, 64))
    change(tmp_path / "a.png")
    with pytest.raises(ValueError, match=f"row 0.*{said}"):
        data.prompt(loaded, 0)


def ranks(world, source, processor, **more):
    """load() on `world` threads whose gather waits for all of them, as a process group would.

    -> each rank's answer, or the ValueError that it raised."""
    box, wall, got = [None] * world, threading.Barrier(world, timeout=60), [None] * world

    def work(rank):
        def gather(obj):
            box[rank] = pickle.dumps(obj)
            wall.wait()
            everyone = [pickle.loads(x) for x in box]
            wall.wait()
            return everyone
        try:
            got[rank] = load(source, processor, rank=rank, world=world, gather=gather, **more)
        except ValueError as error:
            got[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    [x.start() for x in threads]
    [x.join() for x in threads]
    return got


def sizes(n):
    return [row(noise(40 + 30 * i, 64, i)) for i in range(n)]


def test_ranks_agree(processor, tmp_path, checked):
    rows = [x | {"solution": "<X_RAY> a" if i % 4 else "a"} for i, x in enumerate(sizes(7))]
    source = parquet(tmp_path / "a.parquet", rows)
    limit = max(lengths(load(source, processor)).values()) - 1
    alone = load(source, processor, max_prompt_tokens=limit)
    assert alone.bad and alone.too_long and alone.keep
    checked.clear()
    for loaded in ranks(3, source, processor, max_prompt_tokens=limit):
        assert facts(loaded) == facts(alone)
    assert len(checked) == 5  # the rows with a tag: each on one rank only


def test_ranks_stop_alike(processor, tmp_path):
    rows = [x | {"solution": "<X_RAY> a" if i else "a"} for i, x in enumerate(sizes(4))]
    source = parquet(tmp_path / "a.parquet", rows)
    for more, said in (({"max_bad_rows": 0.0}, "row 0, solution"),
                       ({"max_prompt_tokens": 1}, "3 are longer than max_prompt_tokens=1")):
        one, *others = [str(x) for x in ranks(3, source, processor, **more)]
        assert said in one and others == [one, one]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_fingerprint_is_of_the_content_not_the_place(processor, tmp_path, name):
    write = parquet if name == "a.parquet" else jsonl
    rows = [{"problem": f"{i}?", "solution": "<X_RAY> Yes", "image": f"{i}.png"} for i in (0, 1)]
    for folder in (tmp_path / "here", tmp_path / "other"):
        folder.mkdir()
        for i in (0, 1):
            noise(64, 64 + 64 * i).save(folder / f"{i}.png")
    source = write(tmp_path / "here" / name, rows)
    here, copy = load(source, processor), tmp_path / "other" / f"copy-of-{name}"
    shutil.copy(source, copy)
    assert load(copy, processor).fingerprint == here.fingerprint and len(here.fingerprint) == 64
    fewer = load(source, processor, max_prompt_tokens=min(lengths(here).values()))
    assert fewer.keep == [0] and fewer.fingerprint != here.fingerprint
    for change in (rows[::-1], [rows[0], rows[1] | {"solution": "<X_RAY> No"}], rows + rows[:1],
                   [rows[0], rows[1] | {"problem": "2?"}], [rows[0], rows[1] | {"image": "0.png"}]):
        changed = load(write(tmp_path / "here" / name, change), processor)
        assert len(changed.keep) == len(change) and changed.fingerprint != here.fingerprint


def test_fingerprint_sees_the_image_bytes(processor, tmp_path, monkeypatch):
    """Also where small data sets are kept in memory, without a file to hash."""
    monkeypatch.setattr(datasets.config, "IN_MEMORY_MAX_SIZE", 2**30)
    found = [load(parquet(tmp_path / "a.parquet", [row(noise(64, 64, i))]), processor).fingerprint
             for i in (0, 1)]
    assert len(set(found)) == 2


# order

def test_order_is_a_permutation_of_seed_and_epoch():
    for start in (0, 50):
        assert sorted(data.order(range(50), 1, start, 50)) == list(range(50))
    orders = [tuple(data.order(range(50), seed, start, 50)) for seed in (1, 2) for start in (0, 50)]
    assert len(set(orders)) == 4
    again = data.order(range(50), 7, 150, 50)
    assert again == np.random.default_rng([7, 3]).permutation(50).tolist()
    assert data.order(range(50), 1, 20, 0) == data.order(range(50), 1, 50, 0) == []
    assert {type(i) for i in again} == {int}


@pytest.mark.parametrize("k", [1, 3, 7, 20])
def test_order_runs_through_the_epochs(k):
    """Taken k at a time, whatever was taken before: nothing is lost or repeated at a border."""
    whole = [i for epoch in range(8) for i in data.order(range(7), 5, 7 * epoch, 7)]
    got = []
    while len(got) + k <= len(whole):
        got += data.order(range(7), 5, len(got), k)
    assert got == whole[:len(got)] and len(got) > 7 * 4


# real data

@real
def test_real_rows_are_all_good(processor):
    loaded = load(REAL / "medix_real_train.parquet", processor, max_bad_rows=0.0)
    assert len(loaded.keep) == 376 and loaded.bad == [] == loaded.too_long
    for i in (0, 100, 375):
        got = data.prompt(loaded, i)
        assert data.patches(got["images"], processor).shape == (
            sum(h * w for _, h, w in got["grid"]), 3 * 2 * 16 * 16)


@real
def test_real_test_split_is_not_train():
    with pytest.raises(ValueError, match=r"'train': 0 files, .*medix_real_test\.parquet"):
        data.read_rows(REAL)
    assert len(data.read_rows(f"{REAL}@medix_real_test")[0]) == 96
