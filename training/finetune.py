"""All-in-one fine-tuning: the pre-trained variants go on together on the tasks they will be used for."""

from infra.config import ConfigError
from training.entry import run_from_command_line
from training.pretrain import PretrainConfig, pretrain


def finetune(config: PretrainConfig) -> int:
    """Run the stage. Training from scratch is not fine-tuning: ``init_from`` must name an export."""
    if not config.init_from:
        raise ConfigError("init_from: required for fine-tuning: the export folder of a pretrain stage (…/export)")
    return pretrain(config, stage="finetune")


if __name__ == "__main__":
    run_from_command_line("training.finetune", __doc__, PretrainConfig, finetune)
