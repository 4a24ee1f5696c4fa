# 2 CPU cores, no GPU, no download, about 4 minutes:
# python tiny.py && torchrun --nproc_per_node 2 train_grpo.py configs/tiny.py
model = "out/tiny_start/model"  # drawn, built and warmed up by tiny.py
train_data = "out/tiny_start/data@train"
val_data = "out/tiny_start/data@val"
prompt_template = "{question}"
out_dir = "out/tiny"

steps, prompts_per_step, group_size, updates_per_step = 150, 16, 8, 1
max_prompt_tokens, max_response_tokens, tokens_per_micro_batch = 1024, 48, 2048
min_pixels = max_pixels = 64 * 64  # 4 image tokens
val_temperature, val_prompts = 1.0, 512

learning_rate, beta2, warmup_updates = 2e-4, 0.95, 5
kl_coef, clip_ratio_high = 0.0, 0.28
dtype, engine, judge, embedder = "float32", "torch", "exact", "ngram"

validate_every, save_every, keep_checkpoints = 10, 50, 2
