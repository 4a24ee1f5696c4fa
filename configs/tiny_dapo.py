# What DAPO changes in configs/tiny.py, which goes first:
# python tiny.py && torchrun --nproc_per_node 2 train_dapo.py configs/tiny.py configs/tiny_dapo.py
out_dir = "out/tiny_dapo"
steps = 60  # draws about as many responses as 150 steps of GRPO
overlong_buffer_tokens = 8
