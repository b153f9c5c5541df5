"""A recipe: passes in order, with a budget; checked whole, applied one by one, each measured and kept or undone."""

from ldm_export.recipe.run import run_recipe
from ldm_export.recipe.settings import Recipe, read_recipe

__all__ = ["Recipe", "read_recipe", "run_recipe"]
