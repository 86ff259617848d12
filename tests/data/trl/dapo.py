"""DAPO: clip higher, every token equal, long answers punished softly; started at import, with rewards of its own."""

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import get_soft_overlong_punishment, think_format_reward

LIMIT = 4096
BOX = "\\boxed{"


def boxed(completions, **kwargs):
    return [float(BOX in c[0]["content"]) for c in completions]


config = GRPOConfig(
    "dapo",
    loss_type="dapo",
    epsilon=0.2,
    epsilon_high=0.28,
    beta=0.0,
    mask_truncated_completions=True,
    max_completion_length=LIMIT,
    num_generations=16,
    per_device_train_batch_size=16,
    steps_per_generation=4,
    gradient_accumulation_steps=2,
    max_steps=101,
    use_vllm=True,
    vllm_gpu_memory_utilization=0.5,
    vllm_max_model_length=LIMIT + 1024,
    vllm_importance_sampling_mode="token_truncate",
    vllm_importance_sampling_clip_max=2.0,
    top_p=0.95,
    generation_kwargs={"stop": ["</answer>"], "frequency_penalty": 0.1},
)
config.learning_rate = 1e-6
rows = load_dataset("open-r1/DAPO-Math-17k-Processed", "en", split="train[:2000]")
rows = rows.rename_column("question", "prompt")

trainer = GRPOTrainer(
    "Qwen/Qwen2.5-7B",
    [boxed, think_format_reward, get_soft_overlong_punishment(LIMIT, soft_punish_cache=LIMIT // 4)],
    config,
    rows,
)
trainer.train()
