# make demo: a tiny Qwen3-VL learns on drawn images, on a CPU. make test: all tests but those of the
# vLLM engine, which make test-vllm runs with vLLM's CPU build; make test-faults: the long form of the
# attacks on a run, about an hour. Each makes its own environment first.
# Without a GPU, TORCH may name a CPU build of torch.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN = .venv/bin
# Python compiles what it imports, and keeps that: pip, which compiles all, needs twice the time.
INSTALL = $(BIN)/pip install -q --no-compile
unexport PYTHONDONTWRITEBYTECODE
# One thread each: small matrices on many threads wait for each other, above all on a busy machine.
export OMP_NUM_THREADS ?= 1
export HF_HUB_DISABLE_PROGRESS_BARS = 1
export HF_DATASETS_DISABLE_PROGRESS_BARS = 1

.PHONY: demo eval-demo test test-vllm test-faults lint bench

demo: .venv/demo
	$(BIN)/python tiny.py
	$(BIN)/torchrun --nproc_per_node 2 train_grpo.py configs/tiny.py
	$(BIN)/python report.py curve out/tiny --out out/tiny/curve.png
	$(BIN)/python report.py rollouts out/tiny --out out/tiny/rollouts.html

eval-demo: .venv/demo  # after make demo
	$(BIN)/python merge.py out/tiny/checkpoints/latest --out out/tiny/merged --force
	$(BIN)/python eval.py configs/eval.py configs/tiny_eval.py --model=out/tiny/merged

test: .venv/test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not vllm"

test-vllm: .venv-vllm/ready
	.venv-vllm/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m vllm

test-faults: .venv/test
	$(BIN)/python tests/faults.py --rounds 5
	$(BIN)/python tests/faults.py --rounds 2 --trainer train_dapo.py
	$(BIN)/python tests/soak.py

lint: .venv/test
	$(BIN)/ruff check .

bench: .venv/test  # TRL is there; on an idle machine
	@for name in logprob_memory rollout judge_votes packing ranks against_trl; do \
		echo "--- bench/$$name.py"; $(BIN)/python bench/$$name.py || missed="$$missed $$name"; \
	done; test -z "$$missed" || { echo "missed a goal:$$missed"; exit 1; }

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python requirements.txt
	$(INSTALL) "$(TORCH)"
	$(INSTALL) -r requirements.txt
	touch $@

.venv-vllm/ready: tests/vllm_cpu_env.sh
	bash tests/vllm_cpu_env.sh .venv-vllm
	touch $@

.venv/test: .venv/demo requirements-test.txt
	$(INSTALL) -r requirements-test.txt
	touch $@
