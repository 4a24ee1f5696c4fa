# 8 GPUs of 141 GB. The judge shares GPU 0 (start it first):
# CUDA_VISIBLE_DEVICES=0 vllm serve Qwen/Qwen3-4B-Instruct-2507 --port 8085 \
#     --gpu-memory-utilization 0.1 --max-model-len 2048 &
# torchrun --nproc_per_node 8 train_grpo.py configs/30b.py
# Or it has GPU 7 to itself, CUDA_VISIBLE_DEVICES=7, and torchrun gets --nproc_per_node 6.
# GB per GPU, calculated: at rest 54.4, in an update 69.9 (46.6 and 62.1 if kl_coef=0).
# GPU 0 with its judge (~: an estimate; ~4: CUDA, NCCL and the embedder):
#   sampling: 54.4 + 56.4 engine + 14.1 judge + ~4 = ~129
#   update: 69.9 + ~20 activations of 16384 tokens + 14.1 judge + ~4 = ~108
# 8 GPUs of 80 GB are too small: an update takes ~90 (~82 if kl_coef=0) even without the judge.
# Instruct, not Thinking as in MediX-R1: the Thinking template opens <think>, so no response would
# begin with its modality tag, and that part of the reward would be 0.
model = "Qwen/Qwen3-VL-30B-A3B-Instruct"
train_data = "MBZUAI/medix-rl-data"
val_data = "MBZUAI/medix-rl-data@test"
out_dir = "out/30b"

activation_checkpointing = True
tensor_parallel, gpu_memory_utilization = 2, 0.4  # 0.5 would not fit beside the rest
