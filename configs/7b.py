# 8 GPUs of 80 GB. The judge shares GPU 0 (start it first):
# CUDA_VISIBLE_DEVICES=0 vllm serve Qwen/Qwen3-4B-Instruct-2507 --port 8085 \
#     --gpu-memory-utilization 0.17 --max-model-len 2048 &
# torchrun --nproc_per_node 8 train_grpo.py configs/7b.py
# Or it has GPU 7 to itself, CUDA_VISIBLE_DEVICES=7, and torchrun gets --nproc_per_node 7.
# GB per GPU, calculated: at rest 12.4, in an update 16.6, without a reference model.
# GPU 0 with its judge (~: an estimate; ~4: CUDA, NCCL and the embedder):
#   sampling: 12.4 + 40.0 engine + 13.6 judge + ~4 = ~70
#   update: 16.6 + ~18 activations of 16384 tokens + 13.6 judge + ~4 = ~52
model = "Qwen/Qwen2.5-VL-7B-Instruct"
train_data = "MBZUAI/medix-rl-data"
val_data = "MBZUAI/medix-rl-data@test"
out_dir = "out/7b"

activation_checkpointing = True
max_pixels = 3_010_560  # 3840 image tokens of 28 x 28 pixels, as many as Qwen3-VL's of 32 x 32
# GSPO: the only config with an algorithm of its own, hence for train_grpo.py alone.
loss, loss_mean, kl_coef = "gspo", "sequence", 0.0
clip_ratio_low, clip_ratio_high = 3e-4, 4e-4
