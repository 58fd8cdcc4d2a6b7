"""Write docs/recipes.md from the recipes: `python docs/recipes_page.py`."""

from functools import partial
from pathlib import Path

from rmsprop.cli.recipes import equation, settings, unsure
from rmsprop.files import write_whole
from rmsprop.recipes import RECIPES, TEXTS, Recipe, call

NOTE = "<!-- Written by docs/recipes_page.py from rmsprop.recipes. Run `make docs` to renew it. -->\n\n"

HEAD = """# Recipes

Recipes are the settings of published results, by name. A recipe includes the dialect of the framework that produced
the result, so its numbers have the same meaning here.

```python
import torch
from rmsprop import RMSprop, recipe

model = torch.nn.Linear(4, 2)
optimizer = RMSprop.recipe("efficientnet", model.parameters(), lr=0.048)
print(optimizer.param_groups[0]["recipe"])  # efficientnet; lr=0.048 instead of 0.016
```

A recipe fixes its dialect, the dialect's switches and the presence of momentum; other values raise an error with the
reason. Its numbers can be changed, under the dialect's argument names or torch's. The parameter group,
`repr(optimizer)`, `optimizer.explain()` and checkpoints record every change. A changed number also causes a warning,
unless it is the learning rate or a clipping bound. An optimizer does not set the batch size, the schedule or the
clipping of a result, so the recipe describes them in prose. Clipping arguments such as `clip_global_norm=0.5` can be
given along with a recipe.

A recipe whose result is that of averaged weights sets `ema=`, which costs 4 bytes per element of state.
`optimizer.averaged()` evaluates the average ([training.md](training.md#averages-of-the-weights)); `ema=None` turns it
off.

`recipe(name)` returns the recipe as keyword arguments, for libraries that construct the optimizer themselves. They do
not include the learning rate, so that a library can pass its own, as Stable-Baselines3 does; if it passes none,
`RMSprop` uses the recipe's. All values can be pickled and written as JSON.

```python
# stable_baselines3.A2C("MlpPolicy", env, policy_kwargs=policy_kwargs)
policy_kwargs = dict(optimizer_class=RMSprop, optimizer_kwargs=recipe("a2c-sb2"))

# transformers.Trainer(model, args, optimizer_cls_and_kwargs=choice)
choice = (RMSprop, recipe("dpo", lr=1e-6))


# lightning.LightningModule
def configure_optimizers(module):
    return RMSprop(module.parameters(), **recipe("dqn-nature"))
```

A star marks a number that has not been verified or that the source does not state; the recipe's section has details.

"""


def recipes_page() -> str:
    """Return a table of all recipes and a section for each."""
    page = NOTE + HEAD
    rows = [
        [f"[`{row.name}`](#{row.name})", row.title, f"`{row.dialect}`", settings(row)] for row in RECIPES.values()
    ]
    for line in (["recipe", "result", "dialect", "settings"], ["---"] * 4, *rows):
        page += "| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in line) + " |\n"
    return page + "".join(section(row) for row in RECIPES.values())


def section(row: Recipe) -> str:
    """Return a recipe's call, equation, circumstances, unverified parts and source."""
    page = f"\n## {row.name}\n\n{row.title}\n\n```\n{call(row)}\n\n" + "\n".join(equation(row)) + "\n```\n\n"
    lines = [f"{title}: {getattr(row, text)}" for text, title in TEXTS.items() if getattr(row, text)]
    lines += [f"Fixed: {row.fixes}", *unsure(row), f"Source: {row.source}"]
    return page + "".join(f"- {line}.\n" for line in lines)


if __name__ == "__main__":
    path = Path(__file__).parent / "recipes.md"
    write_whole(path, partial(Path.write_text, data=recipes_page(), encoding="utf-8"))
