# The demo's model on the demo's validation data, as its trainer validates:
# torchrun --nproc_per_node 2 eval.py configs/eval.py configs/tiny_eval.py --model=out/tiny/merged
tasks, prompt_template, judge = "phantom", "{question}", "exact"
max_prompt_tokens, max_response_tokens = 1024, 48
min_pixels = max_pixels = 64 * 64
dtype, engine = "float32", "torch"
