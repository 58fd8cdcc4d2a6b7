"""docs/trainers.md, from the rows below and the files in examples/: `python docs/trainers_page.py` writes it."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rmsprop.files import write_whole

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTE = "<!-- Written by docs/trainers_page.py from examples/. Run `make docs` to renew it. -->\n\n"

HEAD = """# In other people's trainers

Every section is a file of at most 40 lines that runs as it stands on a CPU, unless it says otherwise. A trainer makes
the optimizer itself, or wraps it, or rewrites its groups; what it drops on the way it drops without a word. So look:
`print(optimizer.explain())` after the trainer has built it shows the rule and the numbers that are in force.

`make integrations` installs the trainers into `.venv-integrations`, runs each example, and trains once more while the
float64 reference judges every single step under the numbers that were meant to arrive: the schedule's learning rate,
each group's weight decay, and all the rest. Gradient clipping is read off the gradients' norm.

"""

CHECKED = "`make integrations`, {}"


@dataclass(frozen=True)
class Trainer:
    """A trainer, and how RMSprop gets into it.

    Attributes:
        example: the file in examples/, without .py.
        title: its name.
        version: what it was run with, and how.
        does: what it does to an optimizer's arguments.
        ours: how ours arrives.
        traps: what goes wrong there, in sentences.
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
        "passes `lr=` and `optimizer_kwargs`; writes `lr` into the groups at every update",
        "`policy_kwargs=dict(optimizer_class=RMSprop, optimizer_kwargs=...)`",
        (
            "A2C replaces `optimizer_kwargs` by its own (alpha 0.99, eps 1e-5) and takes torch's RMSprop where "
            "`policy_kwargs` names no `optimizer_class`. Name both",
            "A2C's default is torch's rule; Stable-Baselines 2 had TensorFlow's, which `recipe('a2c-sb2')` is. "
            "`rms_prop_eps=` does nothing beside an `optimizer_class`",
        ),
    ),
    Trainer(
        "cleanrl_loop",
        "CleanRL-style loop",
        CHECKED.format("gymnasium 1.4.0"),
        'writes `param_groups[0]["lr"]`; clips before `step`',
        "one import is another",
        ("`param_groups[0]` is the first group only: with several, write the rate into each",),
    ),
    Trainer(
        "torchrl_dqn",
        "TorchRL",
        CHECKED.format("0.14.1"),
        "nothing: the loss module hands out its parameters",
        "`RMSprop(loss_module.parameters(), ...)`",
        ("Of the loss module, not of the actor: a critic's parameters are in the loss module alone",),
    ),
    Trainer(
        "lightning_digits",
        "Lightning",
        CHECKED.format("2.6.6"),
        "nothing; steps with a closure, inside which it clips",
        "returned from `configure_optimizers`",
        (
            "`amp_in_step=True` and `gradient_clip_val` exclude each other: Lightning raises under any mixed "
            "precision, bfloat16 too. Clip in the optimizer (`clip_global_norm=1.0`), or leave amp_in_step off",
            "LightningCLI takes `--optimizer=rmsprop.RMSprop --optimizer.dialect=keras3`; what is not said is the "
            "dialect's. But the configuration that it saves names every argument, with torch's numbers, and in a run "
            "from that file they count as given. Delete the lines that you did not say",
            "Under its FSDP and DeepSpeed strategies the optimizer sees flat pieces: let the trainer clip",
        ),
    ),
    Trainer(
        "hf_trainer",
        "Hugging Face Trainer",
        CHECKED.format("transformers 5.24.0"),
        "makes two groups, weight decay and none; passes the given kwargs whole; warms up from lr 0",
        "`optimizer_cls_and_kwargs=(RMSprop, {...})`",
        (
            "`TrainingArguments.learning_rate` does not reach an optimizer that is given so: without `lr` among the "
            "kwargs it is the dialect's default",
            '`optim="rmsprop"` is torch\'s class. Its `optim_args` were dropped without a word until February 2026 '
            "(transformers, pull request 44203); alpha, momentum, eps, weight_decay and centered arrive since",
            '`optim="rmsprop_bnb"` is [bitsandbytes](dialects/bitsandbytes.md), which accepts a momentum and ignores '
            "it, and refuses centered",
            "`trainer.optimizer` is Accelerate's wrapper; `trainer.optimizer.optimizer` is ours",
        ),
    ),
    Trainer(
        "trl_dpo",
        "DPO, as in TRL",
        "`make integrations`, on transformers' Trainer; TRL 1.16.0's DPOTrainer ran with the same lines by hand",
        "nothing to an optimizer that is given; makes its schedule",
        "`optimizers=(RMSprop.recipe('dpo', model.parameters()), None)`",
        (
            "DPOTrainer takes no `optimizer_cls_and_kwargs`",
            "Give it the parameters that train: where the trainer wraps the model by PEFT, wrap it yourself first",
            "The reference code warms up over 150 steps and clips at 10; DPOConfig's defaults are 0 and 1",
        ),
    ),
    Trainer(
        "accelerate_loop",
        "Accelerate",
        CHECKED.format("1.15.0"),
        "wraps it, and loads its own empty state back into it; steps only when gradients are complete",
        "`accelerator.prepare(optimizer)`",
        (
            "With `amp_in_step=True` an overflow still moves nothing, but `step_was_skipped` is always False, so its "
            "scheduler goes on. Leave it False under fp16",
        ),
    ),
    Trainer(
        "timm_registry",
        "timm",
        CHECKED.format("1.0.31"),
        "puts in `momentum=0.9` where the row says has_momentum, and drops momentum elsewhere; gives weight decay to "
        "groups and 0 to the constructor",
        "`default_registry.register(OptimInfo(name, RMSprop, ...))`",
        (
            "Its `rmsprop` and `rmsproptf` rows have `alpha=0.9`: `create_optimizer_v2(model, 'rmsprop')` is torch's "
            "class with alpha 0.9 and momentum 0.9, not with torch's 0.99 and 0",
            "A name with `_` in it is not found: only what follows the last one is looked up",
            "`create_optimizer_v2` takes names only, no class",
            "A recipe goes into `defaults=recipe('timm-efficientnet-b0')`; its weight decay goes into the call",
        ),
    ),
    Trainer(
        "skorch_digits",
        "skorch",
        CHECKED.format("1.4.0"),
        "always passes `lr`, 0.01 if none is given; steps with a closure; `set_params` writes into the groups",
        "`optimizer=RMSprop, optimizer__alpha=...`",
        (
            "`set_params(optimizer__NAME=...)` on a net that is initialized writes NAME into the groups as it is. "
            "Say alpha, eps or lr there, as a dialect's own words (rho, epsilon) are read at construction only",
        ),
    ),
    Trainer(
        "torchtitan_container",
        "torchtitan-style container",
        "`make integrations`, the example; torchtitan 0.3.0's own OptimizersContainer was run with ours by hand",
        "gives `fused=True, foreach=False` and `param_names` in each group; keys state by name, flat",
        "override `OptimizersContainer._resolve_optimizer_factory` to return RMSprop for its name",
        (
            "DCP makes the state that it loads into by a step of its own, but not where parameters have gradients; "
            "there nothing is loaded, without a word. `zero_grad()` first",
            "`fused=True` insists on a native kernel: on a GPU that is the Triton kernel. "
            '`implementation="foreach"` takes torch\'s operators',
        ),
    ),
    Trainer(
        "deepspeed_zero",
        "DeepSpeed",
        "0.19.8 on one CPU, by hand: it is no part of `make integrations`, as it compiles an operator when it starts",
        "refuses classes outside its list unless allowed; puts one flat float32 tensor in the place of each group's",
        '`"zero_allow_untested_optimizer": true`, and `optimizer=` of `deepspeed.initialize`',
        (
            "The list is by type, so a subclass of torch's Adam is refused as well",
            "A parameter is a flat piece of all of a group's: `clip_norm=` (of each tensor) and `lint`'s remarks on "
            "tensors mean the piece. Clip by `gradient_clipping` in the configuration",
        ),
    ),
    Trainer(
        "torchao_offload",
        "torchao's CPUOffloadOptimizer",
        "`make integrations`, 0.18.0: it refuses a CPU, and its loop with a CPU in the GPU's place; not run on a GPU",
        "builds one optimizer for each tensor of 4096 elements or more, with all kwargs",
        "`CPUOffloadOptimizer(params, RMSprop, lr=...)`",
        (
            "Needs CUDA or XPU: on a CPU it raises",
            "`clip_global_norm=` would see one tensor at a time, and clipping outside is not supported with "
            "offload_gradients=True",
        ),
    ),
    Trainer(
        "ultralytics_trainer",
        "Ultralytics-type name look-up",
        "`make integrations`, the example; Ultralytics 8.4.190 trained two epochs with such a subclass by hand",
        "`getattr(torch.optim, name)` behind a list of names; passes SGD's momentum 0.937; its warm-up writes "
        "`momentum` and `lr` into every group",
        "a subclass's `build_optimizer`, given as `trainer=`; nothing is patched",
        (
            "momentum 0.937 makes a steady step 15.9·lr: `lint` warns of it, and says which lr steps as far without",
            "momentum in the constructor is not enough: the warm-up writes `warmup_momentum` (0.8) up to `momentum` "
            "over it. Give both as 0 to `train`",
            "`warmup_bias_lr` is 0.1 by default: RMSprop's steps are as long as lr whatever the gradient, so biases "
            "move by 0.1/√(1−alpha), 0.3 to 1, in the first step. Give 0",
            "Its checkpoints keep `square_avg` in float32, and round `momentum_buffer` and `grad_avg` to float16",
        ),
    ),
)


def trainers_page() -> str:
    """A table of what each trainer does to arguments, then a section for each with its example."""
    page = NOTE + HEAD
    rows = [[f"[{row.title}](#{_slug(row.title)})", row.does, row.ours, row.version] for row in TRAINERS]
    for line in (["trainer", "what it does to arguments", "how ours arrives", "run with"], ["---"] * 4, *rows):
        page += "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n"
    return page + "".join(section(row) for row in TRAINERS)


def section(row: Trainer) -> str:
    """A trainer's traps, and its example as it stands in the repository."""
    code = (EXAMPLES / f"{row.example}.py").read_text(encoding="utf-8")
    page = f"\n## {row.title}\n\n" + "".join(f"- {trap}.\n" for trap in row.traps)
    return page + f"\n[examples/{row.example}.py](../examples/{row.example}.py):\n\n```python\n{code}```\n"


def _slug(title: str) -> str:
    """The anchor of a heading."""
    return "".join(c for c in title.lower() if c.isalnum() or c in " -").replace(" ", "-")


if __name__ == "__main__":
    path = Path(__file__).parent / "trainers.md"
    write_whole(path, partial(Path.write_text, data=trainers_page(), encoding="utf-8"))
