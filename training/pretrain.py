"""Dynamic co-pretraining of DyNet's weight-shared variants on degradations made on the fly."""

from functools import partial

from pydantic import model_validator

from datagen.degradations import load_recipe
from training.config import StageConfig
from training.corruption import degrade_by_recipe
from training.cotraining import CotrainingConfig, cotraining_objective
from training.entry import run_from_command_line
from training.loop import run_stage
from training.models import variants_of


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
        return self


def pretrain(config: PretrainConfig, stage: str = "pretrain") -> int:
    """Run the stage; see ``training.loop.run_stage`` for what is written and returned."""
    recipe = load_recipe(config.recipe)  # refused here, before any process joins another
    objective = cotraining_objective(config.cotraining, config.seed)
    return run_stage(stage, config, objective, partial(degrade_by_recipe, recipe))


if __name__ == "__main__":
    run_from_command_line("training.pretrain", __doc__, PretrainConfig, pretrain)
