"""Dynamic co-pretraining of DyNet's weight-shared variants on degradations made on the fly."""

from functools import partial

from pydantic import model_validator

from datagen.degradations import Recipe, load_recipe
from training.config import StageConfig
from training.corruption import degrade_by_recipe
from training.cotraining import CotrainingConfig, cotraining_objective, variants_of_step
from training.entry import run_from_command_line
from training.loop import run_stage
from training.models import DyNetConfig, variants_of
from training.validation import Task


class PretrainConfig(StageConfig):
    """A stage that trains variants of one network on a recipe of degradations."""

    recipe: str = "dynet_pretrain"  # name in configs/degradations/, or a path
    cotraining: CotrainingConfig = CotrainingConfig()

    @model_validator(mode="after")
    def _variants_exist(self) -> "PretrainConfig":
        unknown = set(self.cotraining.variants) - set(variants_of(self.model))
        if unknown:
            raise ValueError(
                f"cotraining.variants: {sorted(unknown)} are not variants of this model: {variants_of(self.model)}"
            )
        if self.cotraining.mode == "random_depth" and not isinstance(self.model, DyNetConfig):
            raise ValueError("cotraining.mode=random_depth: only a dynet has depths to draw")
        if self.cotraining.mode == "distill" and not self.ema_decay:
            raise ValueError("ema_decay: mode distill takes its teacher from the moving average; set it above 0")
        if self.cotraining.separate_moments and self.zero_stage:
            raise ValueError("zero_stage: must be 0 with cotraining.separate_moments; ZeRO holds one set of moments")
        return self


def pretrain(config: PretrainConfig, stage: str = "pretrain") -> int:
    """Run the stage; see ``training.loop.run_stage`` for what is written and returned."""
    cotraining = config.cotraining
    recipe = load_recipe(config.recipe)  # refused here, before any process joins another
    measured = load_recipe(config.validation.recipe) if config.validation.recipe else recipe
    objective = cotraining_objective(cotraining, config.model, config.seed, config.steps)
    sets = cotraining.variants if cotraining.separate_moments else ("",)

    def set_of(step: int) -> str:
        return str(variants_of_step(cotraining, config.model, config.seed, step)[0]) if len(sets) > 1 else sets[0]

    return run_stage(
        stage,
        config,
        objective,
        partial(degrade_by_recipe, recipe),
        tasks=tasks_of(measured, cotraining.trained),
        moments=(sets, set_of),
    )


def tasks_of(recipe: Recipe, variants: tuple[str, ...]) -> list[Task]:
    """Each chain of a recipe as a task of its own."""
    alone = [(chain.label, recipe.model_copy(update={"chains": [chain]})) for chain in recipe.chains]
    return [Task(label, partial(degrade_by_recipe, one), variants) for label, one in alone]


if __name__ == "__main__":
    run_from_command_line("training.pretrain", __doc__, PretrainConfig, pretrain)
