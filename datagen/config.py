"""Everything a curation run can be told."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from datagen.select.neighbours import MAX_RADIUS
from infra.cluster import launch_directory
from infra.config import Config
from infra.tracking import TrackingConfig


class SourceConfig(Config):
    """Where pictures come from.

    ``uri``: a folder, ``s3://bucket/prefix``, ``embedded:pictures`` or ``embedded:held_out``. A relative folder is
    taken from where the command was started (for a Ray job: where ``ray start`` was).
    ``name``: stands for the uri in samples, so that the same pictures in another place give the same dataset; by
    default ``source-0``, ``source-1`` … (for the leak guard ``guard-0`` …) in the order given.
    """

    uri: str = Field(min_length=1)
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9_-]+$")
    licence: str = ""


class ScanConfig(Config):
    """What is measured, and the limits beyond which no pixel is decoded (those of ``select`` judge what was measured).

    ``scores``: learned scores of your own, name to ``module:function``; the function takes uint8 RGB
    ``[height, width, 3]`` and returns a number. The module must be importable on every node.
    """

    pictures_per_piece: int = Field(256, ge=1, description="pictures a Ray task scans; lost work when a worker dies")
    seconds_per_picture: float = Field(120.0, gt=0, description="a picture that takes longer is given up")
    max_megapixels: float = Field(150.0, gt=0, le=178, description="decompression-bomb guard; Pillow's own is 178")
    min_side: int = Field(32, ge=16, description="pixels; smaller pictures are rejected by their header, undecoded")
    min_bytes: int = Field(0, ge=0, description="smaller files are not even read")
    max_bytes: int = Field(512 * 1024**2, ge=1, description="larger files are not even read")
    max_aspect: float = Field(20.0, ge=1)
    min_jpeg_quality: int = Field(0, ge=0, le=100)
    min_bits_per_pixel: float = Field(0.0, ge=0, description="JPEG only")
    niqe_patches: int = Field(32, ge=0, description="96x96 patches that NIQE looks at; 0 leaves it out")
    niqe_model: str | None = Field(None, description="JSON of `datagen fit-niqe`; null is the one that ships")
    scores: dict[str, str] = Field(default_factory=dict)


class Limits(Config):
    """An interval; a side that is not given is open."""

    min: float | None = None
    max: float | None = None


class SelectConfig(Config):
    """Thresholds over the inventory. Measures and their units: ``datagen.picture.quality.measure``."""

    min_side: int = Field(256, ge=1)
    max_aspect: float = Field(4.0, ge=1)
    min_jpeg_quality: int = Field(75, ge=0, le=100)
    min_bits_per_pixel: float = Field(1.0, ge=0, description="JPEG only: lossless formats pack flat pictures small")
    min_laplacian_variance: float = Field(50.0, ge=0)
    max_flat_fraction: float = Field(0.95, ge=0, le=1)
    min_entropy: float = Field(4.0, ge=0, le=8)
    max_blockiness: float = Field(1.6, ge=1)
    max_noise: float = Field(15.0, ge=0)
    max_niqe: float | None = Field(None, gt=0, description="null: no gate")
    scores: dict[str, Limits] = Field(default_factory=dict, description="limits for scan.scores, by name")
    max_overexposed: float = Field(0.4, ge=0, le=1)
    max_underexposed: float = Field(0.4, ge=0, le=1)
    duplicate_radius: int = Field(6, ge=0, le=MAX_RADIUS, description="bits of 64, over eight orientations")
    duplicate_correlation: float = Field(0.95, ge=-1, le=1, description="of 32x32 thumbnails; confirms a hash match")
    leak_radius: int = Field(7, ge=0, le=MAX_RADIUS)
    leak_correlation: float = Field(0.9, ge=-1, le=1)
    leak_crops: bool = Field(True, description="also match crops that keep 3/4 of each side, either way round")


class TileConfig(Config):
    """How a kept picture is cut. A picture whose longer side is below ``whole_below`` stays whole."""

    size: int | None = Field(512, ge=64, description="pixels; null packs every picture whole")
    whole_below: int = Field(1024, ge=0, description="pixels")
    max_overlap: float = Field(0.25, ge=0, lt=1, description="share of a tile; so that no pixel of a side is left out")
    align: int = Field(16, ge=1, description="tile corners lie on multiples of it: the largest JPEG MCU")
    max_per_picture: int | None = Field(None, ge=1, description="the sharpest are taken; null takes all that pass")
    min_laplacian_variance: float = Field(50.0, ge=0)
    max_flat_fraction: float = Field(0.95, ge=0, le=1)


class PackConfig(Config):
    """How tiles become shards.

    ``crop``: ``lossless_jpeg`` cuts tiles of JPEG pictures in the DCT domain, on MCU borders, and stores what cannot
    be cut so as PNG; ``png`` stores every tile as PNG.
    """

    samples_per_shard: int = Field(1000, ge=1, description="at most; shards are evened out, none is left short")
    bytes_per_shard: int | None = Field(None, ge=1, description="a target, by the bits per pixel of the sources")
    crop: Literal["lossless_jpeg", "png"] = "lossless_jpeg"
    png_compression: int = Field(3, ge=0, le=9)


class DatagenConfig(Config):
    """One curation: pictures in, a verified dataset out."""

    source: tuple[SourceConfig, ...] = ()
    out: str = Field(min_length=1, description="a folder or s3:// prefix; relative folders as for sources")
    leak_guard: tuple[SourceConfig, ...] = ()
    seed: int = 0
    num_cpus: int | None = Field(None, ge=1, description="size of the local Ray, when no cluster is joined")
    scan: ScanConfig = ScanConfig()
    select: SelectConfig = SelectConfig()
    tiles: TileConfig = TileConfig()
    pack: PackConfig = PackConfig()
    tracking: TrackingConfig | None = Field(None, description="where MLflow records the run; null: nowhere")

    @field_validator("source", "leak_guard", mode="before")
    @classmethod
    def _one_or_a_list(cls, value: Any) -> Any:
        values = value if isinstance(value, list | tuple) else [value]
        return tuple({"uri": v} if isinstance(v, str) else v for v in values)

    @model_validator(mode="after")
    def _names_differ(self) -> "DatagenConfig":
        names = [name_of(source, i) for i, source in enumerate(self.source)]
        names += [name_of(source, i, "guard") for i, source in enumerate(self.leak_guard)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two sources are named {twice[0]!r}")
        return self


def name_of(source: SourceConfig, index: int, role: str = "source") -> str:
    """The name that stands for a source in samples."""
    return source.name or f"{role}-{index}"


def absolute(uri: str) -> str:
    """``uri`` as it holds in any process of the cluster: relative folders are taken from the launch directory."""
    if "://" in uri or uri.startswith("embedded:"):
        return uri.rstrip("/")
    path = Path(uri).expanduser()
    return str(path if path.is_absolute() else launch_directory() / path)
