"""What every training stage is configured by. A stage adds its own section to ``StageConfig``."""

from typing import Annotated, Literal

from pydantic import Field

from infra.config import Config
from infra.tracking import TrackingConfig
from training.models import ModelConfig

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]


class DataConfig(Config):
    """Which shards are read, and how patches are cut from them."""

    dataset: str  # URI of a folder or prefix: with dataset.json, or plain WebDataset tars from elsewhere
    patch: Positive = 128  # side of a clean patch, pixels
    batch: Positive = 32  # patches in the global batch, over all ranks
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


class OptimizerConfig(Config):
    """Adam as every paper here uses it; decoupled decay with ``adamw``."""

    name: Literal["adam", "adamw"] = "adam"
    lr: Rate = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    # DeepSpeed clips to 1.0 when nothing is said; the papers do not clip. 0 means off.
    gradient_clipping: Annotated[float, Field(ge=0)] = 0.0


class ScheduleConfig(Config):
    """Learning rate over steps: linear warm-up, then constant, cosine to ``floor``, or halved every ``halve_every``."""

    kind: Literal["constant", "cosine", "halve"] = "constant"
    warmup: NotNegative = 0  # steps
    floor: Annotated[float, Field(ge=0)] = 0.0  # lowest learning rate
    halve_every: Positive = 200_000  # steps


class StageConfig(Config):
    """One training stage: what it trains, on what, how long, and where it writes."""

    out: str  # local folder: checkpoints/, export/, log.txt, finished.json
    seed: NotNegative = 0
    steps: Positive
    model: ModelConfig
    init_from: str = ""  # export folder of an earlier stage whose weights are the start
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast, weights stay float32
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999  # 0 turns the moving average off
    log_every: Positive = 50
    checkpoint_every: Positive = 1000
    keep_checkpoints: Positive = 2
    tracking: TrackingConfig = TrackingConfig()
