"""A vLLM server with GPUs of its own, rows in a local file, rewards of the script itself."""

import re

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

MODEL = "Qwen/Qwen2.5-1.5B-Instruct"
NUMBER = re.compile(r"-?\d+")


def last_number(text):
    found = NUMBER.findall(text)
    return found[-1] if found else None


def right_number(completions, answer, **kwargs):
    return [float(last_number(c[0]["content"]) == a) for c, a in zip(completions, answer)]


def short(completions, **kwargs):
    return [-len(c[0]["content"]) / 1000 for c in completions]


def main():
    args = GRPOConfig(
        output_dir=f"runs/{MODEL}-GRPO",
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
        num_generations=8,
        max_completion_length=1024,
        num_train_epochs=2,
        learning_rate=2e-6,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        max_grad_norm=0.2,
        adam_beta2=0.99,
        weight_decay=0.1,
        beta=0.001,
        use_vllm=True,
        vllm_mode="server",
        vllm_server_host="10.0.0.7",
        vllm_server_timeout=600,
        reward_weights=[1.0, 0.25],
        logging_steps=1,
        report_to="wandb",
        run_name="numbers",
        bf16=True,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation="flash_attention_2"),
        processing_class=AutoTokenizer.from_pretrained(MODEL),
        reward_funcs=[right_number, short],
        args=args,
        train_dataset=load_dataset("json", data_files="rows.jsonl", split="train"),
    )
    trainer.train()


if __name__ == "__main__":
    main()
