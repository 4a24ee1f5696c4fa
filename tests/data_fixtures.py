"""A small processor folder (byte-level BPE, Qwen tokens, chat template) and drawn images."""
import io
import json

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen3VLConfig

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>"]
TAGS = ("X_RAY", "MICROSCOPY", "CLINICAL_PHOTOGRAPHY", "CT_SCAN", "GRAPHICS", "ANGIOGRAPHY",
        "PET_SCAN", "ULTRASOUND", "MRI_SCAN", "FUNDUS_PHOTOGRAPHY", "OCT_SCAN", "ENDOSCOPY",
        "MAMMOGRAPHY", "FLUOROSCOPY", "OTHER", "SPECT")
MEAN, STD = [0.48, 0.45, 0.40], [0.26, 0.27, 0.28]  # unequal, so that a swapped channel shows
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def write_processor(folder, patch):
    """Qwen3-VL for patch 16, Qwen2.5-VL for patch 14: what load_processor needs, no weights."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    text = ["Is there a pleural effusion?", "Which organ is shown here?", "user\nassistant\n"]
    bpe.train_from_iterator(text * 9, trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>",
                                        pad_token="<|endoftext|>", chat_template=CHAT)
    tokenizer.save_pretrained(folder)
    kind = Qwen3VLConfig if patch == 16 else Qwen2_5_VLConfig
    config = kind(image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
                  vision_config={"patch_size": patch, "spatial_merge_size": 2,
                                 "temporal_patch_size": 2})
    config.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(
        {"image_processor_type": "Qwen2VLImageProcessor", "image_mean": MEAN, "image_std": STD,
         "patch_size": patch, "merge_size": 2, "temporal_patch_size": 2}))
    return str(folder)


def noise(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def encoded(image, kind="PNG", **more):
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def row(*images, problem="Is there a pleural effusion?", solution="<X_RAY> Yes"):
    return {"problem": problem, "solution": solution,
            "image": [{"bytes": x if isinstance(x, bytes) else encoded(x), "path": None}
                      for x in images]}
