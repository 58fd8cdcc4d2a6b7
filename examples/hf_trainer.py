"""Hugging Face Trainer: a small GPT-2 with `optimizer_cls_and_kwargs`, which passes on every argument.

Run: pip install . 'transformers[torch]' && python examples/hf_trainer.py
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from rmsprop import RMSprop

SCHEDULE = dict(lr_scheduler_type="linear", warmup_steps=10, max_grad_norm=1.0, weight_decay=0.01)
QUIET = dict(report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True)


def train(folder: str, steps: int = 60, **options) -> tuple[RMSprop, list[float]]:
    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=2))
    rows = [(torch.arange(16) * stride + start) % 32 for stride in range(1, 9) for start in range(32)]
    arguments = dict(max_steps=steps, per_device_train_batch_size=16, logging_steps=10, **SCHEDULE, **QUIET)
    trainer = Trainer(
        model,
        TrainingArguments(folder, **{**arguments, **options}),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        # Set lr here, since TrainingArguments.learning_rate does not reach an optimizer that is passed this way.
        optimizer_cls_and_kwargs=(RMSprop, dict(lr=2e-3, alpha=0.95, eps=1e-6, centered=True)),
    )
    trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return trainer.optimizer.optimizer, losses  # unwraps Accelerate's optimizer


if __name__ == "__main__":
    optimizer, losses = train("gpt2-run")
    print(optimizer.explain(), f"\nloss {losses[0]:.2f} -> {losses[-1]:.2f}")
