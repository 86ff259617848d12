"""GSPO: one ratio a sequence; each generated batch is cut into four steps, on colocated vLLM."""

from datasets import load_dataset
from my_rewards import judged
from trl import GRPOConfig, GRPOTrainer

if __name__ == "__main__":
    dataset = load_dataset("csv", data_files={"train": "rows.csv", "test": "held_out.csv"})
    training_args = GRPOConfig(
        importance_sampling_level="sequence",
        loss_type="grpo",
        beta=0.04,
        use_bias_correction_kl=False,
        epsilon=3e-4,
        epsilon_high=4e-4,
        gradient_accumulation_steps=1,
        steps_per_generation=4,
        per_device_train_batch_size=32,
        num_generations=4,
        max_steps=400,
        warmup_steps=20,
        lr_scheduler_type="constant_with_warmup",
        sync_ref_model=True,
        ref_model_sync_steps=100,
        scale_rewards="batch",
        use_vllm=True,
        vllm_tensor_parallel_size=2,
        eval_strategy="steps",
        eval_steps=50,
        save_steps=0.25,
        save_total_limit=3,
        seed=7,
    )
    trainer = GRPOTrainer(
        model="Qwen/Qwen3-30B-A3B",
        reward_funcs=judged,
        args=training_args,
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
    )
    trainer.train()
