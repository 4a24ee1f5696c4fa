"""What vLLM says of a merged folder, from disk.

    python tests/merge_vllm.py logprobs MODEL KIND OUT.json    # of merge_runs.sequences(KIND)
    python tests/merge_vllm.py unpublished CHECKPOINT OUT      # merge.py, with experts written as
                                                               # transformers holds them
    python tests/merge_vllm.py spoilt CHECKPOINT OUT           # or spoilt before vLLM reads it"""

import json
import os
import sys
from argparse import Namespace
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from merge_runs import sequences
from safetensors.torch import load_file, save_file
from tiny_models import IMAGE

import merge


def logprobs(path, kind, out):
    from PIL import Image
    from vllm import LLM, SamplingParams

    llm = LLM(path, dtype="float32", max_model_len=512, enforce_eager=True, seed=0,
              gpu_memory_utilization=0.2, mm_processor_kwargs={"min_pixels": 1})
    found = []
    for group, response in sequences(kind):
        whole = group["ids"] + response
        ids = [t for last, t in zip([None, *whole], whole) if not t == last == IMAGE]
        images = {"image": [Image.fromarray(x) for x in group["images"]]}
        request = {"prompt_token_ids": ids, "multi_modal_data": images if images["image"] else {}}
        [answer] = llm.generate(request, SamplingParams(max_tokens=1, prompt_logprobs=0))
        assert answer.prompt_token_ids == whole
        found += [step[t].logprob for t, step in zip(whole, answer.prompt_logprobs)
                  if step][-len(response):]
    with open(out, "w") as file:
        json.dump(found, file)


def run(checkpoint, out):
    merge.main(Namespace(checkpoint=checkpoint, out=out, dtype="float32", push_to_hub=None,
                         adapter=False, public=False, force=False))


def rewrite(folder, change):
    files = load_file(folder / "model.safetensors")
    save_file({n: change(n, x).contiguous() for n, x in files.items()},
              folder / "model.safetensors", metadata={"format": "pt"})


def unpublished(checkpoint, out):
    write = merge.write

    def wrong(model, base, folder, dtype):
        write(model, base, folder, dtype)
        rewrite(folder, lambda n, x: x.transpose(1, 2) if ".experts." in n else x)

    merge.write = wrong
    run(checkpoint, out)


def spoilt(checkpoint, out):
    load = merge.rollout.load

    def late(cfg, *more):
        if cfg.engine == "vllm":
            rewrite(Path(cfg.model),
                    lambda n, x: x.flip(0) if "layers.1.self_attn.o_proj" in n else x)
        return load(cfg, *more)

    merge.rollout.load = late
    run(checkpoint, out)


globals()[sys.argv[1]](*sys.argv[2:])
