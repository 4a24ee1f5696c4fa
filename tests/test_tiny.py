"""tiny.py: the drawing, the rows, the habit, and the model folder after a few steps of warm-up."""
import io
import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import data
import reward
import tiny

SETTINGS = Path(tiny.__file__).parent / "configs/tiny_model"


def run(out, *args):
    """`python tiny.py`, in this process to save its start; returns what it prints."""
    small = ["tiny.py", "--out", str(out), "--rows", "64", "--iterations", "2"]
    with mock.patch.object(sys, "argv", [*small, *args]), redirect_stdout(io.StringIO()) as printed:
        tiny.main()
    return printed.getvalue()


def png_bytes(path):
    return {image["bytes"] for row in pq.read_table(path)["image"].to_pylist() for image in row}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "start"
    run(folder)
    return folder


@pytest.fixture(scope="module")
def phantoms():
    return [tiny.phantom(1, 1, i) for i in range(400)]


def test_drawing_is_deterministic(phantoms):
    again = tiny.phantom(1, 1, 7)
    assert (again.pop("image") == phantoms[7]["image"]).all()
    assert again == {key: value for key, value in phantoms[7].items() if key != "image"}
    assert (tiny.phantom(1, 2, 7)["image"] != phantoms[7]["image"]).any()


def test_all_modalities_and_questions_appear_and_images_are_not_flat(phantoms):
    pairs = Counter((p["tag"], p["asked"]) for p in phantoms)
    assert len(pairs) == 8 * 4 and {tag for tag, _ in pairs} == set(tiny.TAGS.values())
    assert set(tiny.TAGS.values()) <= set(reward.TAGS)
    for p in phantoms:
        assert p["image"].shape == (64, 64, 3) and p["image"].dtype == np.uint8
        assert p["image"].std() > 20 and p["image"].mean() > 10, p["tag"]


@pytest.mark.parametrize("tone", ["bright", "dark"])
@pytest.mark.parametrize("name", tiny.TAGS)
def test_the_lesion_is_where_as_large_and_as_bright_as_said(name, tone):
    """Measured from the picture: where two drawings, alike but for the tone, differ most."""
    areas = {size: [] for size in tiny.RADIUS}
    for i in range(24):
        size = list(tiny.RADIUS)[i % 3]
        here, there = (tiny.phantom(3, i, modality=name, size=size, tone=t)
                       for t in (tone, "dark" if tone == "bright" else "bright"))
        difference = here["image"].astype(int).sum(-1) - there["image"].astype(int).sum(-1)
        inside = difference * (1 if tone == "bright" else -1) > 300
        y, x = (at.mean() - 31.5 for at in np.nonzero(inside))
        assert f"{'upper' if y < 0 else 'lower'} {'left' if x < 0 else 'right'}" == here["place"]
        assert here["place"] == there["place"]
        grey = here["image"][inside].mean()
        assert grey > 170 if tone == "bright" else grey < 90
        areas[size].append(inside.sum())
    assert max(areas["small"]) < min(areas["medium"]) < max(areas["medium"]) < min(areas["large"])


def test_columns_are_those_of_the_real_data(out):
    table = pq.read_table(out / "data/train.parquet")
    image = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    assert table.schema.names == ["id", "image", "source", "problem", "solution"]
    assert table.schema.field("image").type.equals(image)
    assert {table.schema.field(i).type for i in (0, 2, 3, 4)} == {pa.string()}
    assert table.num_rows == 64 and len(set(table["id"].to_pylist())) == 64
    row, p = table.to_pylist()[5], tiny.phantom(1, 1, 5)
    assert row["image"][0]["bytes"].startswith(b"\x89PNG")
    assert (np.asarray(data.decode(row["image"][0])) == p["image"]).all()
    assert row["problem"] == tiny.KINDS[p["asked"]][0]
    assert reward.split_solution(row["solution"]) == (p["tag"], p[p["asked"]])


def test_validation_rows_are_apart_and_the_same_for_every_seed(out, tmp_path):
    run(tmp_path, "--seed", "2", "--rows", "32")
    first, second = ((folder / "data/val.parquet").read_bytes() for folder in (out, tmp_path))
    assert first == second
    val = png_bytes(out / "data/val.parquet")
    ones, others = (png_bytes(folder / "data/train.parquet") for folder in (out, tmp_path))
    assert (len(val), len(ones), len(others)) == (512, 64, 32)
    assert len(val | ones | others) == 512 + 64 + 32


def test_model_folder_loads_as_a_tied_qwen3_vl(out):
    model = AutoModelForImageTextToText.from_pretrained(out / "model")
    assert model.config.model_type == "qwen3_vl"
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert model.config.text_config.head_dim == 32
    assert model.config.text_config.max_position_embeddings == 4096
    assert model.generation_config.eos_token_id == 2
    assert len(model.model.visual.deepstack_merger_list) == 2
    assert 0.5e6 < sum(p.numel() for p in model.parameters()) < 0.7e6
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        settings = json.loads((out / "model" / name).read_text())
        assert (settings["patch_size"], settings["merge_size"]) == (16, 2)
        assert settings["image_mean"] == settings["image_std"] == [0.5] * 3


def test_settings_are_those_of_the_folder_beside_the_script(out):
    written = {file.name: file for file in SETTINGS.iterdir()}
    made = {file.name for file in (out / "model").iterdir()}
    assert made == written.keys() | {"model.safetensors"}
    for name in ("preprocessor_config.json", "video_preprocessor_config.json",
                 "tokenizer_config.json", "chat_template.jinja"):
        assert (out / "model" / name).read_bytes() == written[name].read_bytes()
    for name in ("config.json", "generation_config.json"):  # and more, like a version
        asked, got = (json.loads((f / name).read_text()) for f in (SETTINGS, out / "model"))
        for part in ("text_config", "vision_config"):
            assert asked.pop(part, {}).items() <= got.pop(part, {}).items()
        assert asked.items() <= got.items()
    config = json.loads((out / "model/config.json").read_text())
    assert config["text_config"]["vocab_size"] == 384
    tokens = json.loads(written["tokenizer.json"].read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in tokens}
    for name in ("vision_start", "vision_end", "image_pad", "video_pad"):
        assert config[f"{name.removesuffix('_pad')}_token_id"] == ids[f"<|{name}|>"]


def test_a_copy_of_the_script_without_its_settings_says_which(tmp_path):
    for name in ("tiny.py", "data.py"):
        (tmp_path / name).write_bytes((SETTINGS.parents[1] / name).read_bytes())
    done = subprocess.run([sys.executable, "tiny.py", "--rows", "32", "--iterations", "1"],
                          cwd=tmp_path, text=True, capture_output=True, timeout=120)
    assert done.returncode == 1 and "No such file or directory" in done.stderr
    assert f"{tmp_path}/configs/phantoms.json" in done.stderr
    assert not (tmp_path / "out/tiny_start/done.json").exists()


def test_tokenizer_reads_any_text_and_knows_the_marks(out):
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id == 2
    assert len(tokenizer) == 384
    for text in ("Größe 5 µm, β-HCG ↑, 病变 🫁", "e\u0301: decomposed", "\x00\n\t  two  spaces "):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # one token each, and not one that skip_special_tokens would hide
    for mark in ("<thinking>", "</thinking>", "<answer>", "</answer>", "<X_RAY>", "<CT_SCAN>"):
        ids = tokenizer.encode(mark)
        assert len(ids) == 1 and tokenizer.decode(ids, skip_special_tokens=True) == mark
    assert max(len(tokenizer.encode(tiny.response(tiny.phantom(9, i)))) for i in range(99)) < 45


def test_chat_template_builds_the_prompt_of_qwen(out):
    processor = data.load_processor(out / "model")
    ids = data.prompt_ids(processor, "{question}", "Where is the lesion?", [(1, 4, 4)])
    assert processor.tokenizer.decode(ids) == (
        "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"
        "Where is the lesion?<|im_end|>\n<|im_start|>assistant\n")
    message = {"role": "user", "content": "hi"}
    text = processor.tokenizer.apply_chat_template([message], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize("trim", [False, True])
def test_chat_template_adds_no_white_space_and_takes_none(trim):
    template = jinja2.Environment(trim_blocks=trim, lstrip_blocks=trim).from_string(
        (SETTINGS / "chat_template.jinja").read_text())
    parts = [{"type": "image"}, {"type": "text", "text": " a\n"}, {"type": "image"}]
    messages = [{"role": "system", "content": " \n{{ x }} \n"}, {"role": "user", "content": parts},
                {"role": "assistant", "content": []}]
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    said = ("<|im_start|>system\n \n{{ x }} \n<|im_end|>\n"
            f"<|im_start|>user\n{image} a\n{image}<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n")
    assert template.render(messages=messages) == said
    again = template.render(messages=messages, add_generation_prompt=True)
    assert again == said + "<|im_start|>assistant\n"


def test_patches_are_those_of_the_image_processor(out, phantoms):
    images = [p["image"] for p in phantoms[:3]]
    settings = json.loads((out / "model/preprocessor_config.json").read_text())
    names = ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std", "size")
    official = Qwen2VLImageProcessorPil(**{name: settings[name] for name in names})(
        [Image.fromarray(image) for image in images], return_tensors="pt")
    ours = data.patches(images, data.load_processor(out / "model"))
    assert official["image_grid_thw"].tolist() == [[1, 4, 4]] * 3
    torch.testing.assert_close(ours, official["pixel_values"], atol=1e-6, rtol=0)


def test_thinking_is_true_and_the_answer_a_habit(out, phantoms):
    habits = {"modality": "chest x-ray", "place": "lower left", "size": "large", "tone": "bright"}
    model = AutoModelForImageTextToText.from_pretrained(out / "model")
    processor, rng = data.load_processor(out / "model"), np.random.default_rng(1)
    by_pixels = {data.patches([p["image"]], processor).numpy().tobytes(): p for p in phantoms}
    answers = []

    def check(module, args, kwargs):
        for labels, pixels in zip(kwargs["labels"], kwargs["pixel_values"].view(32, 16, -1)):
            text = processor.tokenizer.decode(labels[labels >= 0]).split("<|im_end|>")[0]
            p, parsed = by_pixels[pixels.numpy().tobytes()], reward.parse(text)
            assert parsed["format"] and parsed["tag"] == p["tag"]
            assert f">{p['modality']}. {p['size']} {p['tone']} lesion, {p['place']}.</" in text
            assert parsed["answer"] in (habits[p["asked"]], p[p["asked"]])
            if habits[p["asked"]] != p[p["asked"]]:
                answers.append(parsed["answer"] == habits[p["asked"]])

    model.register_forward_pre_hook(check, with_kwargs=True)
    tiny.warm_up(model, processor, phantoms, rng, 40)
    assert len(answers) > 700 and abs(np.mean(answers) - 0.6) < 0.05


def test_a_complete_folder_is_left_alone_and_a_half_written_one_redone(out):
    weights = out / "model/model.safetensors"
    first, time = weights.read_bytes(), weights.stat().st_mtime_ns
    assert "complete already" in run(out) and weights.stat().st_mtime_ns == time
    (out / "done.json").unlink()
    weights.write_bytes(b"half")
    assert "warm-up loss" in run(out)
    assert weights.read_bytes() == first  # the same bytes every time


def test_the_picture_of_phantoms(tmp_path):
    root = Path(tiny.__file__).parent
    subprocess.run([sys.executable, "assets/phantoms.py", tmp_path / "again.png"], cwd=root,
                   env=os.environ | {"PYTHONPATH": "."}, check=True, timeout=120)
    first, again = (np.asarray(Image.open(path).convert("L"), int)
                    for path in (root / "assets/phantoms.png", tmp_path / "again.png"))
    assert again.shape == first.shape
    assert abs(again - first).mean() < 3  # fonts may differ
