"""Write docs/trainers.md from the rows below and the files in examples/: `python docs/trainers_page.py`."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rmsprop.files import write_whole

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTE = "<!-- Written by docs/trainers_page.py from examples/. Run `make docs` to renew it. -->\n\n"

HEAD = """# In other people's trainers

Each section has an example of at most 40 lines that runs in a clone, on a CPU unless stated otherwise. A trainer may
construct the optimizer, wrap it or rewrite its groups, and it may silently drop arguments. To check,
`print(optimizer.explain())` after the trainer has built the optimizer; it shows the rule and the numbers in force.

`make integrations` installs the trainers into `.venv-integrations` and runs each example. It then trains once more
and compares every step with the float64 reference under the intended settings, including the scheduled learning rate
and each group's weight decay. It checks gradient clipping by the norm of the gradients.

"""

CHECKED = "`make integrations`, {}"


@dataclass(frozen=True)
class Trainer:
    """A trainer and the way to use RMSprop in it.

    Attributes:
        example: the file in examples/, without .py.
        title: its name.
        version: the version and the way in which it was run.
        does: its effect on an optimizer's arguments.
        ours: the code that makes it use this package's RMSprop.
        traps: pitfalls, as sentences without the final period.
    """

    example: str
    title: str
    version: str
    does: str
    ours: str
    traps: tuple[str, ...] = ()


TRAINERS = (
    Trainer(
        "sb3_a2c",
        "Stable-Baselines3",
        CHECKED.format("2.9.2"),
        "passes `lr=` and `optimizer_kwargs`; sets `lr` in the groups at every update",
        "`policy_kwargs=dict(optimizer_class=RMSprop, optimizer_kwargs=...)`",
        (
            "If `policy_kwargs` has no `optimizer_class`, A2C uses torch's RMSprop and replaces `optimizer_kwargs` "
            "with its own (alpha 0.99, eps 1e-5). Give both",
            "A2C's own numbers, for the same training with a faster step, are "
            "`optimizer_kwargs=dict(alpha=0.99, eps=1e-5)`",
            "A2C uses torch's rule by default; Stable-Baselines 2 used TensorFlow's, which is `recipe('a2c-sb2')`. "
            "`rms_prop_eps=` has no effect together with an `optimizer_class`",
        ),
    ),
    Trainer(
        "cleanrl_loop",
        "CleanRL-style loop",
        CHECKED.format("gymnasium 1.4.0"),
        'sets `param_groups[0]["lr"]`; clips before `step`',
        "change one import",
        ("`param_groups[0]` is the first group only; with several groups, set the rate of each",),
    ),
    Trainer(
        "torchrl_dqn",
        "TorchRL",
        CHECKED.format("0.14.1"),
        "none; the loss module provides the parameters",
        "`RMSprop(loss_module.parameters(), ...)`",
        ("Pass the parameters of the loss module, not of the actor; only the loss module has the critic's",),
    ),
    Trainer(
        "lightning_digits",
        "Lightning",
        CHECKED.format("2.6.6"),
        "none; steps with a closure, inside which it clips",
        "returned from `configure_optimizers`",
        (
            "`amp_in_step=True` and `gradient_clip_val` exclude each other: Lightning raises under any mixed "
            "precision, including bfloat16. Clip in the optimizer (`clip_global_norm=1.0`) or leave amp_in_step off",
            "LightningCLI takes `--optimizer=rmsprop.RMSprop --optimizer.dialect=keras3`, with the dialect's "
            "defaults for all other arguments. But the configuration that it saves lists every argument with torch's "
            "numbers, and in a run from that file they override the dialect. Delete the lines that you did not set",
            "Under the FSDP and DeepSpeed strategies the optimizer receives flat shards, so let the trainer clip",
        ),
    ),
    Trainer(
        "hf_trainer",
        "Hugging Face Trainer",
        CHECKED.format("transformers 5.24.0"),
        "makes two groups, with and without weight decay; passes all given kwargs; warms up from lr 0",
        "`optimizer_cls_and_kwargs=(RMSprop, {...})`",
        (
            "`TrainingArguments.learning_rate` does not reach this optimizer; without `lr` among the kwargs, the "
            "dialect's default applies",
            '`optim="rmsprop"` is torch\'s class. Until February 2026 it silently dropped `optim_args`; since then '
            "(transformers, pull request 44203) it passes alpha, momentum, eps, weight_decay and centered",
            '`optim="rmsprop_bnb"` is [bitsandbytes](dialects/bitsandbytes.md), which accepts a momentum and ignores '
            "it, and raises for centered",
            "`trainer.optimizer` is Accelerate's wrapper; `trainer.optimizer.optimizer` is the RMSprop",
        ),
    ),
    Trainer(
        "trl_dpo",
        "DPO, as in TRL",
        "`make integrations`, on transformers' Trainer; the same lines were run by hand with TRL 1.16.0's DPOTrainer",
        "none to a given optimizer; makes its own schedule",
        "`optimizers=(RMSprop.recipe('dpo', model.parameters()), None)`",
        (
            "DPOTrainer does not take `optimizer_cls_and_kwargs`",
            "Give it the trainable parameters; if the trainer would wrap the model with PEFT, wrap it yourself first",
            "The reference code warms up over 150 steps and clips at 10; DPOConfig's defaults are 0 and 1",
        ),
    ),
    Trainer(
        "accelerate_loop",
        "Accelerate",
        CHECKED.format("1.15.0"),
        "wraps the optimizer and loads its own empty state back into it; steps only when gradients are complete",
        "`accelerator.prepare(optimizer)`",
        (
            "With `amp_in_step=True`, an overflow still changes no parameter, but `step_was_skipped` is always "
            "False, so the scheduler advances. Keep amp_in_step=False under fp16",
        ),
    ),
    Trainer(
        "timm_registry",
        "timm",
        CHECKED.format("1.0.31"),
        "adds `momentum=0.9` if the entry has has_momentum, else drops momentum; gives weight decay to groups and 0 "
        "to the constructor",
        "`default_registry.register(OptimInfo(name, RMSprop, ...))`",
        (
            "Its `rmsprop` and `rmsproptf` entries have `alpha=0.9`, so `create_optimizer_v2(model, 'rmsprop')` is "
            "torch's class with alpha 0.9 and momentum 0.9, not torch's defaults 0.99 and 0",
            "A name that contains `_` is not found, since timm looks up only the part after the last `_`",
            "`create_optimizer_v2` takes a name, not a class",
            "Give a recipe as `defaults=recipe('timm-efficientnet-b0')`, and its weight decay in the call",
        ),
    ),
    Trainer(
        "skorch_digits",
        "skorch",
        CHECKED.format("1.4.0"),
        "always passes `lr`, 0.01 by default; steps with a closure; `set_params` writes into the groups",
        "`optimizer=RMSprop, optimizer__alpha=...`",
        (
            "`set_params(optimizer__NAME=...)` on an initialized net writes NAME into the groups unchanged. Use "
            "alpha, eps or lr there, since a dialect's own names (rho, epsilon) are read at construction only",
        ),
    ),
    Trainer(
        "torchtitan_container",
        "torchtitan-style container",
        "`make integrations`, the example; torchtitan 0.3.0's own OptimizersContainer was run by hand",
        "gives `fused=True, foreach=False` and `param_names` in each group; flattens the state by name",
        "override `OptimizersContainer._resolve_optimizer_factory` to return RMSprop for its name",
        (
            "DCP creates the state to load into by calling step, but not if parameters have gradients; then it "
            "silently loads nothing. Call `zero_grad()` first",
            "`fused=True` requires a native kernel, which on a GPU is the Triton kernel. "
            '`implementation="foreach"` uses torch\'s operators',
        ),
    ),
    Trainer(
        "deepspeed_zero",
        "DeepSpeed",
        "0.19.8 on one CPU, by hand; not part of `make integrations`, since it compiles an operator at startup",
        "refuses classes outside its list unless allowed; replaces each group's tensors by one flat float32 tensor",
        '`"zero_allow_untested_optimizer": true`, and `optimizer=` of `deepspeed.initialize`',
        (
            "It compares types exactly, so it refuses a subclass of torch's Adam as well",
            "A parameter is a flat shard of a whole group, so `clip_norm=` (per tensor) and the tensor findings of "
            "`lint` refer to that shard. Clip with `gradient_clipping` in the configuration",
        ),
    ),
    Trainer(
        "torchao_offload",
        "torchao's CPUOffloadOptimizer",
        "`make integrations`, 0.18.0: its error on a CPU, and its loop with a CPU in place of the GPU; not run on a "
        "GPU",
        "builds one optimizer with all kwargs for each tensor of 4096 elements or more",
        "`CPUOffloadOptimizer(params, RMSprop, lr=...)`",
        (
            "It requires CUDA or XPU and raises on a CPU",
            "`clip_global_norm=` would apply to one tensor at a time, and torchao does not support clipping outside "
            "the optimizer with offload_gradients=True",
        ),
    ),
    Trainer(
        "ultralytics_trainer",
        "Ultralytics-style name lookup",
        "`make integrations`, the example; such a subclass trained two epochs by hand with Ultralytics 8.4.190",
        "calls `getattr(torch.optim, name)` for a list of names; passes SGD's momentum 0.937; its warm-up sets "
        "`momentum` and `lr` in every group",
        "override `build_optimizer` in a subclass and give it as `trainer=`; no patching",
        (
            "With momentum 0.937 a steady step is 15.9·lr; `lint` warns about it and names the lr with the same step "
            "length without momentum",
            "Setting momentum in the constructor is not enough, since the warm-up overwrites it with values from "
            "`warmup_momentum` (0.8) to `momentum`. Give both as 0 to `train`",
            "`warmup_bias_lr` is 0.1 by default. RMSprop's steps are as long as lr whatever the gradient, so biases "
            "move by 0.1/√(1−alpha), 0.3 to 1, in the first step. Give 0",
            "Its checkpoints keep `square_avg` in float32 and round `momentum_buffer` and `grad_avg` to float16",
        ),
    ),
)


def trainers_page() -> str:
    """Return a table of the trainers and a section for each with its example."""
    page = NOTE + HEAD
    rows = [[f"[{row.title}](#{_slug(row.title)})", row.does, row.ours, row.version] for row in TRAINERS]
    for line in (["trainer", "effect on the optimizer", "how to use RMSprop", "tested with"], ["---"] * 4, *rows):
        page += "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n"
    return page + "".join(section(row) for row in TRAINERS)


def section(row: Trainer) -> str:
    """Return a trainer's traps and its example."""
    code = (EXAMPLES / f"{row.example}.py").read_text(encoding="utf-8")
    page = f"\n## {row.title}\n\n" + "".join(f"- {trap}.\n" for trap in row.traps)
    return page + f"\n[examples/{row.example}.py](../examples/{row.example}.py):\n\n```python\n{code}```\n"


def _slug(title: str) -> str:
    """Return the anchor of a heading."""
    return "".join(c for c in title.lower() if c.isalnum() or c in " -").replace(" ", "-")


if __name__ == "__main__":
    path = Path(__file__).parent / "trainers.md"
    write_whole(path, partial(Path.write_text, data=trainers_page(), encoding="utf-8"))
