# 1 GPU of 24 GB: an adapter is trained on the frozen language model. The judge is elsewhere, on a
# second GPU (as in configs/2b.py) or a service with the same API (judge_model, judge_api_key_env):
# torchrun --nproc_per_node 1 train_grpo.py configs/2b_1gpu.py --judge_url=http://HOST:8085/v1
# 35 million weights are trained. GB, calculated: at rest 4.7, in an update 4.8
# (~: an estimate; ~3: CUDA and the embedder):
#   sampling: 4.7 + 12.0 engine + ~3 = ~20
#   update: 4.8 + ~4 activations of 8192 tokens + ~3 = ~12
# To train all weights instead, 38 GB of them, gradients and moments on the CPU:
# --lora_rank=0 --freeze_vision=False --offload=True --learning_rate=1e-6
model = "Qwen/Qwen3-VL-2B-Instruct"
train_data = "MBZUAI/medix-rl-data"
val_data = "MBZUAI/medix-rl-data@test"
out_dir = "out/2b_1gpu"

lora_rank, learning_rate, freeze_vision = 32, 1e-5, True  # the KL term needs no second model
prompts_per_step, updates_per_step, val_prompts = 64, 2, 512
max_pixels, max_prompt_tokens, max_response_tokens = 1_048_576, 1536, 2048
tokens_per_micro_batch, activation_checkpointing = 8192, True
