# All settings of both trainers, but the algorithm's own, with which each script begins. A config
# like configs/2b.py changes some of them, --key=value on the command line others.

# --- model and data
model = ""  # folder or hub id of a Qwen2.5-VL, Qwen3-VL or Qwen3-VL-MoE
train_data = val_data = ""  # hub id, folder, parquet, json or jsonl; @split after any of them
prompt_template = "configs/prompt.txt"  # a file, or the text itself, with {question} in it
max_prompt_tokens, max_response_tokens = 4352, 4096
min_pixels, max_pixels = 262_144, 3_932_160  # the images of a row share max_pixels
max_bad_rows = 0.01  # share of the rows; more stops the run

# --- how much of it
seed, steps, epochs = 1, 0, 2  # steps = 0: as many as the epochs need
prompts_per_step, group_size, updates_per_step = 512, 5, 4
val_prompts = 0  # 0: all of val_data
validate_every = save_every = 5
keep_checkpoints, accept_changes = 3, False  # a restart may change some settings only with it
log = ""  # or "wandb"

# --- sampling
temperature = 1.0
val_temperature, val_top_p = 0.0, 1.0  # above 0: val_sampled/*, beside the greedy val/*
engine, engine_args = "vllm", {}  # or "torch"; more arguments of vllm.LLM
tensor_parallel, gpu_memory_utilization = 1, 0.5
max_engine_gap = 0.0  # mean |engine - trainer| log-prob; 0: 1e-3 in float32, 0.1 in bfloat16
engine_is_cap = 0.0  # tokens weigh min(exp(trainer - engine), cap); 0: off
old_logprobs = "trainer"  # or "engine": one pass less where a step has several updates

# --- updates
learning_rate, warmup_updates = 1e-6, 0
beta2, weight_decay, max_grad_norm = 0.999, 0.01, 1.0
freeze_vision = False
lora_rank = 0  # above 0: an adapter on the frozen model; learning_rate 10 times as high

# --- memory
tokens_per_micro_batch = 16384  # a row never has more
dtype = "bfloat16"  # of the computation; "float32"
activation_checkpointing = False
shard_ranks = 0  # so many ranks hold the model once; 0: those of a node
offload = False  # weights, gradients and AdamW's state to the CPU: slow, but it fits

# --- reward
judge, judge_url = "http", "http://localhost:8085/v1"  # or "exact": equal after normalisation
judge_model = "Qwen/Qwen3-4B-Instruct-2507"
judge_api_key_env = ""  # the name of a variable that holds the key
judge_args = {"structured_outputs": {"choice": ["YES", "NO"]}}  # of the request; {}: not vLLM
judge_check = True  # it must be right about known answers before the run starts
judge_concurrency, judge_timeout_s, judge_patience_s = 64, 30.0, 300.0
max_unscored = 0.05  # share of the responses; more stops the run
embedder = "abhinand/MedEmbed-large-v0.1"  # or "ngram"
embed_threshold, embed_soft = 0.8, False  # soft: the cosine itself
weight_judge, weight_embed, weight_modality, weight_format = 0.575, 0.375, 0.05, 0.1

# --- what a run refuses: settings that break a rule (of those that its trainer has)
_rules = """model and train_data and val_data
max_response_tokens > 0
tokens_per_micro_batch >= max_prompt_tokens + max_response_tokens
overlong_buffer_tokens <= max_response_tokens
steps + epochs > 0
group_size > 1
prompts_per_step >= ranks
updates_per_step > 0
prompts_per_step % updates_per_step == 0
max_rounds > 0
validate_every > 0
save_every > 0
keep_checkpoints > 0
log in ('', 'wandb')
temperature > 0
engine in ('vllm', 'torch')
tensor_parallel > 0
engine == 'vllm' or tensor_parallel == 1 and not engine_args
node_ranks % tensor_parallel == 0
ranks % (shard_ranks or 1) == 0
old_logprobs in ('trainer', 'engine')
loss in ('grpo', 'gspo', 'cispo')
loss_mean in ('token', 'sequence')
keep in ('correctness', 'reward', 'medix')
learning_rate > 0
max_grad_norm > 0
dtype in ('bfloat16', 'float32')
judge in ('http', 'exact')
judge_timeout_s > 0
weight_format <= 1
embed_threshold <= 1""".split("\n")
# --- and what a restart may change: _free settings, never _fixed ones, others with accept_changes
_fixed = set("""model seed train_rows prompts_per_step group_size updates_per_step max_prompt_tokens
    max_response_tokens min_pixels max_pixels prompt_template freeze_vision lora_rank""".split())
_free = set("""out_dir steps epochs validate_every save_every keep_checkpoints log accept_changes
    judge_url judge_api_key_env judge_timeout_s judge_patience_s judge_concurrency max_unscored
    engine engine_args tensor_parallel gpu_memory_utilization max_engine_gap tokens_per_micro_batch
    activation_checkpointing offload shard_ranks""".split())
