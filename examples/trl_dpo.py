"""DPO with the settings of its reference code; TRL's DPOTrainer takes the same `optimizers=` and arguments.

Run: pip install . 'transformers[torch]' && python examples/trl_dpo.py
"""

import copy

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from rmsprop import RMSprop

MEANT = dict(lr_scheduler_type="constant_with_warmup", warmup_steps=10, max_grad_norm=10.0)  # 150 steps there
QUIET = dict(report_to="none", save_strategy="no", disable_tqdm=True, remove_unused_columns=False, use_cpu=True)


class DPO(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):  # noqa: ARG002
        margin = self.gain(model, inputs["chosen"]) - self.gain(model, inputs["rejected"])
        return -torch.nn.functional.logsigmoid(0.1 * margin).mean()

    def gain(self, model, ids):
        before = self.start(ids).logits.detach().log_softmax(-1)
        return (model(ids).logits.log_softmax(-1) - before)[:, :-1].gather(2, ids[:, 1:, None]).sum((1, 2))


def train(folder: str, steps: int = 30, lr: float = 1e-4) -> tuple[RMSprop, float]:
    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=32, n_layer=2, n_head=2))
    pairs = [{"chosen": torch.arange(8) + i, "rejected": torch.arange(8).flip(0) + i} for i in range(24)]
    optimizer = RMSprop.recipe("dpo", model.parameters(), lr=lr)  # 5e-7 for a pretrained model
    arguments = TrainingArguments(folder, max_steps=steps, **MEANT, **QUIET)
    trainer = DPO(model, arguments, train_dataset=pairs, optimizers=(optimizer, None))
    trainer.start = copy.deepcopy(model)
    return optimizer, trainer.train().training_loss


if __name__ == "__main__":
    optimizer, loss = train("dpo-run")
    print(optimizer.explain(), f"\nmean loss {loss:.3f}, from log 2 = 0.693")
