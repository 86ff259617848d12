"""Dr. GRPO as its authors have it: no deviation, a constant length; two passes over each batch, adapters, and a callback."""

import trl
from datasets import load_dataset
from peft import LoraConfig
from rewards import math as graders
from transformers import AutoModelForSequenceClassification

common = dict(temperature=0.9, min_p=0.05, bf16=False)  # noqa: C408
options = trl.GRPOConfig(
    output_dir="out",
    loss_type="dr_grpo",
    scale_rewards=False,
    num_iterations=2,
    max_completion_length=300,
    use_cpu=True,
    max_steps=50,
    entropy_coef=0.001,
    optim="adamw_8bit",
    repetition_penalty=1.1,
    learning_rte=1e-5,
    **common,
)
grader = AutoModelForSequenceClassification.from_pretrained("my-org/reward", num_labels=1)


class LoggingGRPOTrainer(trl.GRPOTrainer):
    def log(self, *args):
        pass


if __name__ == "__main__":
    trainer = LoggingGRPOTrainer(
        model="Qwen/Qwen2.5-Math-1.5B",
        args=options,
        reward_funcs=[graders.equal, grader],
        train_dataset=load_dataset("parquet", data_files="rows.parquet", split="train"),
        peft_config=LoraConfig(r=16),
        callbacks=[print],
    )
    trainer.train()
