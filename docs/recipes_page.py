"""docs/recipes.md, from the rows: `python docs/recipes_page.py` writes it."""

from functools import partial
from pathlib import Path

from rmsprop.cli.recipes import equation, settings, unsure
from rmsprop.files import write_whole
from rmsprop.recipes import RECIPES, TEXTS, Recipe, call

NOTE = "<!-- Written by docs/recipes_page.py from rmsprop.recipes. Run `make docs` to renew it. -->\n\n"

HEAD = """# Recipes

The settings that published results were trained with, by name. A recipe names whose RMSprop it was, so its numbers
mean here what they meant there.

```python
import torch
from rmsprop import RMSprop, recipe

model = torch.nn.Linear(4, 2)
optimizer = RMSprop.recipe("efficientnet", model.parameters(), lr=0.048)
print(optimizer.param_groups[0]["recipe"])  # efficientnet; lr=0.048 instead of 0.016
```

A recipe fixes its dialect, the dialect's switches and whether there is momentum; another value is refused with the
reason. Its numbers may be changed, in the dialect's words or torch's. What was changed stands in the parameter group,
in `repr(optimizer)`, in `optimizer.explain()` and in checkpoints; a changed number is a warning too, unless it is the
learning rate or a bound for clipping. Batch size, schedule, clipping and what else belongs to a result are given in
words, since an optimizer does not do them; `clip_global_norm=0.5` and the like are arguments of `RMSprop`, and may be
given with a recipe.

`recipe(name)` is the same as keyword arguments, for libraries that make the optimizer themselves. The learning rate
is not among them, so that a library can pass its own, as Stable-Baselines3 does; where it passes none, the recipe's
is taken. The values are plain: they go through JSON and pickle.

```python
# stable_baselines3.A2C("MlpPolicy", env, policy_kwargs=policy_kwargs)
policy_kwargs = dict(optimizer_class=RMSprop, optimizer_kwargs=recipe("a2c-sb2"))

# transformers.Trainer(model, args, optimizer_cls_and_kwargs=choice)
choice = (RMSprop, recipe("dpo", lr=1e-6))


# lightning.LightningModule
def configure_optimizers(module):
    return RMSprop(module.parameters(), **recipe("dqn-nature"))
```

A star marks a number that nobody has looked up, or that its source does not state; the recipe's section says which.

"""


def recipes_page() -> str:
    """One table of all recipes, then a section for each."""
    page = NOTE + HEAD
    rows = [
        [f"[`{row.name}`](#{row.name})", row.title, f"`{row.dialect}`", settings(row)] for row in RECIPES.values()
    ]
    for line in (["recipe", "whose", "dialect", "settings"], ["---"] * 4, *rows):
        page += "| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in line) + " |\n"
    return page + "".join(section(row) for row in RECIPES.values())


def section(row: Recipe) -> str:
    """A recipe's call and equation, what belongs to it, what is unsure, and where it was read."""
    page = f"\n## {row.name}\n\n{row.title}\n\n```\n{call(row)}\n\n" + "\n".join(equation(row)) + "\n```\n\n"
    lines = [f"{title}: {getattr(row, text)}" for text, title in TEXTS.items() if getattr(row, text)]
    lines += [f"Fixed: {row.fixes}", *unsure(row), f"Source: {row.source}"]
    return page + "".join(f"- {line}.\n" for line in lines)


if __name__ == "__main__":
    path = Path(__file__).parent / "recipes.md"
    write_whole(path, partial(Path.write_text, data=recipes_page(), encoding="utf-8"))
