# 8 GPUs of 80 GB. The judge shares GPU 0 (start it first):
# CUDA_VISIBLE_DEVICES=0 vllm serve Qwen/Qwen3-4B-Instruct-2507 --port 8085 \
#     --gpu-memory-utilization 0.17 --max-model-len 2048 &
# torchrun --nproc_per_node 8 train_grpo.py configs/2b.py
# Or it has GPU 7 to itself, CUDA_VISIBLE_DEVICES=7, and torchrun gets --nproc_per_node 7.
# GB per GPU, calculated: at rest 3.7, in an update 4.8 (3.2 and 4.3 if kl_coef=0).
# GPU 0 with its judge (~: an estimate; ~4: CUDA, NCCL and the embedder):
#   sampling: 3.7 + 40.0 engine + 13.6 judge + ~4 = ~61
#   update: 4.8 + ~44 activations of 12288 tokens + 13.6 judge + ~4 = ~67
model = "Qwen/Qwen3-VL-2B-Instruct"
train_data = "MBZUAI/medix-rl-data"
val_data = "MBZUAI/medix-rl-data@test"
out_dir = "out/2b"

tokens_per_micro_batch = 12288  # without activation checkpointing, which takes a third more time
