"""What every training stage is configured by. A stage adds its own section to ``StageConfig``."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from infra.config import Config
from infra.tracking import TrackingConfig
from training.models import ModelConfig

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]


class Progress(Config):
    """Patch and batch from a step on: networks see more of a picture late in training, when it pays (Restormer)."""

    from_step: Positive
    patch: Positive  # side of a clean patch, pixels
    batch: Positive  # patches in the global batch


class DataConfig(Config):
    """Which shards are read, and how patches are cut from them."""

    dataset: str  # URI of a folder or prefix: with dataset.json, or plain WebDataset tars from elsewhere
    patch: Positive = 128  # side of a clean patch, pixels
    batch: Positive = 32  # patches in the global batch, over all ranks
    progressive: tuple[Progress, ...] = ()  # other patches and batches from later steps on
    crops_per_sample: Positive = 1  # patches cut from one decoded sample; they share its decode
    crop: Literal["uniform", "detail"] = "uniform"  # detail: fewer patches from regions that are flat
    depth: bool = False  # read <key>.depth.png where a sample has one; haze then follows it
    workers: NotNegative = 0  # loader processes a rank
    window: Positive = 16  # shards that are shuffled together; bounds the open shards
    # Of a remote store, whole shards through the cache (one node, or several epochs that fit it), or one ranged read
    # a sample (many nodes: each would fetch every shard otherwise). auto: shard.
    fetch: Literal["auto", "shard", "sample"] = "auto"
    cache: str = ""  # folder for the index and shards of a remote store; empty: a temporary one
    cache_gib: Annotated[float, Field(gt=0)] = 50.0  # least recently used shards beyond this are deleted
    on_damage: Literal["stop", "skip"] = "stop"  # skip: another sample stands in, and the loss is counted
    degrade_on: Literal["worker", "device"] = "worker"  # device: a GPU that has time to spare
    channels_last: bool = False  # memory layout of what the network gets; faster for convolutions on a GPU

    @model_validator(mode="after")
    def _progress_in_order(self) -> "DataConfig":
        steps = [progress.from_step for progress in self.progressive]
        if steps != sorted(set(steps)):
            raise ValueError(f"progressive: from_step must rise from one to the next, got {steps}")
        return self


class OptimizerConfig(Config):
    """Adam as every paper here uses it; decoupled decay with ``adamw``."""

    name: Literal["adam", "adamw"] = "adam"
    lr: Rate = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: Rate = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    # DeepSpeed clips to 1.0 when nothing is said; the papers do not clip. 0 means off.
    gradient_clipping: Annotated[float, Field(ge=0)] = 0.0


class ScheduleConfig(Config):
    """Learning rate over steps: linear warm-up, then constant, cosine to ``floor``, or halved every ``halve_every``."""

    kind: Literal["constant", "cosine", "halve"] = "constant"
    warmup: NotNegative = 0  # steps
    floor: Annotated[float, Field(ge=0)] = 0.0  # lowest learning rate
    halve_every: Positive = 200_000  # steps


class GuardConfig(Config):
    """When a step is skipped: not finite, or a loss far above what was usual. See ``training.guard``."""

    spike: Annotated[float, Field(ge=0)] = 10.0  # times the running mean of the loss; 0 turns it off
    patience: Positive = 10  # skipped steps in a row after which the run stops


class ValidationConfig(Config):
    """Measurements on held-out pictures while a stage trains. See ``training.validation``."""

    pictures: str = ""  # folder of pictures that are not in the dataset; empty: no validation
    every: Positive = 1000  # steps
    crop: Positive = 256  # the centre of each picture, pixels; bounds the cost
    limit: Positive = 16  # pictures at most, the first by name
    recipe: str = ""  # its chains are the tasks; empty: those of the stage itself
    grid: NotNegative = 3  # pictures in the sample grid


class StageConfig(Config):
    """One training stage: what it trains, on what, how long, and where it writes."""

    out: str  # local folder: checkpoints/, export/, best/, log.txt, finished.json
    seed: NotNegative = 0
    steps: Positive
    model: ModelConfig
    init_from: str = ""  # export folder of an earlier stage whose weights are the start
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast, weights stay float32
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999  # 0 turns the moving average off
    accumulate: Positive = 1  # parts of the global batch that a rank computes one after the other in each step
    zero_stage: Literal[0, 1, 2] = 0  # what DeepSpeed shares out over the ranks: optimizer state (1), gradients too (2)
    compile: bool = False  # torch.compile of the repeated blocks, for all variants at once
    guard: GuardConfig = GuardConfig()
    validation: ValidationConfig = ValidationConfig()
    log_every: Positive = 50
    checkpoints: str = ""  # folder or s3:// prefix; empty: checkpoints/ in out
    checkpoint_every: Positive = 1000
    keep_checkpoints: Positive = 2  # the last ones
    keep_every: NotNegative = 0  # checkpoints of multiples of this step are never removed; 0: of none
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("zero_stage", mode="before")
    @classmethod
    def _not_stage_3(cls, stage: Any) -> Any:
        if stage == 3:
            raise ValueError(
                "ZeRO stage 3 gives weights that a step leaves out the gradient of an earlier step (measured with "
                "DeepSpeed 0.19.8), and these networks fit any device whole. Allowed: 0, 1, 2"
            )
        return stage
