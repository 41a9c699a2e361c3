"""One picture becomes one inventory row: measured, or with the reason why not.

Cheapest first: the size of the file before any read, its header before any pixel, its pixels before any learned score.
A picture that is refused early keeps what was learnt until then.
"""

import functools
import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from datagen.config import ScanConfig
from datagen.dataset import canonical_json
from datagen.picture.decode import Header, PictureError, decode, read_header
from datagen.picture.niqe import PristineModel, load_model, niqe
from datagen.picture.perceptual_hash import area_mean, center_hash, grey_thumb, hashes
from datagen.picture.quality import WHOLE_PICTURE_MEASURES, luma, measure
from datagen.scan.inventory import INVENTORY_SCHEMA
from datagen.scan.scores import require_scores, score
from datagen.source.listing import Member, Picture, read_picture
from datagen.source.tar import FAULTS
from infra.config import ConfigError
from infra.storage import NotFoundError, StorageError, open_store

THUMBNAIL_SIDE = 160
# What lies between the members of one sample in a tar: headers and padding, long names included.
_TAR_GAPS = 16 * 1024

Measure = Callable[[bytes, ScanConfig], dict[str, Any]]


def measure_picture(data: bytes, limits: ScanConfig) -> dict[str, Any]:
    """What the bytes of a file say, stage by stage.

    Returns:
        the columns of the inventory from ``bytes`` on; ``verdict`` is measured, rejected (by a limit) or failed (by
        damage, or because a learned score raised).
    """
    row: dict[str, Any] = {**identify(data), "stage": "header"}
    try:
        header = read_header(data, round(limits.max_megapixels * 1e6))
        row |= _describe(header, len(data))
        _require_header(row, limits)
        row["stage"] = "decode"
        pixels, conversions = decode(data, header)
        row |= {"width": pixels.shape[1], "height": pixels.shape[0], "conversions": conversions, "stage": "measure"}
        row |= _measure_pixels(pixels, limits)
        if limits.scores:
            row["scores"] = score(pixels, limits.scores)
    except PictureError as error:
        verdict = "failed" if error.failed else "rejected"
        return row | {"verdict": verdict, "reason": error.reason, "error": str(error)}
    except Exception as error:  # A picture that no measure foresaw is a row too, and its error can be looked up.
        return row | {"verdict": "failed", "reason": "measure_failed", "error": f"{type(error).__name__}: {error}"}
    return row | {"verdict": "measured", "reason": ""}


def require_measures(limits: ScanConfig) -> None:
    """Load in this process what measuring needs besides the picture: the NIQE model and the learned scores.

    Raises:
        ConfigError: naming the key and what is not there.
    """
    if limits.niqe_patches:
        try:
            pristine_model(limits.niqe_model)
        except (OSError, ValueError) as error:
            raise ConfigError(f"scan.niqe_model: {error}") from None
    require_scores(limits.scores)


def row_of(picture: Picture, limits: ScanConfig, batch: int, measure_file: Measure = measure_picture) -> dict[str, Any]:
    """The row, ``datagen.scan.inventory.INVENTORY_SCHEMA``, of one picture of a listing. Never raises for its sake.

    ``measure_file`` is :func:`measure_picture`, or the same under guard.
    """
    row: dict[str, Any] = dict.fromkeys(INVENTORY_SCHEMA.names)
    row |= {"source": picture.source, "root": picture.root, "key": picture.key, "licence": picture.licence}
    row |= {"bytes": picture.size, "version": picture.version, "batch": batch}
    row |= {"verdict": "failed", "stage": "read", "reason": picture.fault, "error": FAULTS.get(picture.fault)}
    if picture.member:
        row |= {"container": picture.member.container, "offset": picture.member.offset}
    if picture.fault:
        return row
    try:
        _require_bytes(picture.size, limits)
        data, text, fields = _read(picture)
    except PictureError as error:
        return row | {"verdict": "rejected", "reason": error.reason, "error": str(error)}
    except NotFoundError as error:
        return row | {"reason": "missing", "error": str(error)}
    except StorageError as error:
        return row | {"reason": "unreadable", "error": str(error)}
    return row | caption_of(text, fields) | measure_file(data, limits)


def identify(data: bytes) -> dict[str, Any]:
    """The columns that need no more than the bytes of the file."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def caption_of(text: bytes | None, fields: bytes | None) -> dict[str, Any]:
    """``caption`` and ``fields`` from ``<key>.txt`` and ``<key>.json``; JSON that is broken counts as none.

    The caption is the text, else the ``caption`` of the fields.
    """
    try:
        found = json.loads(fields) if fields else None
        spelled = canonical_json(found).decode() if found is not None else None
    except (ValueError, RecursionError):
        found = spelled = None
    caption = text.decode(errors="replace").strip() if text is not None else None
    if caption is None and isinstance(found, dict) and isinstance(found.get("caption"), str):
        caption = found["caption"]
    return {"caption": caption, "fields": spelled}


def _read(picture: Picture) -> tuple[bytes, bytes | None, bytes | None]:
    """The picture's bytes and those of the text and the fields beside it in its tar."""
    if picture.member is None or not (picture.member.text or picture.member.json):
        return read_picture(picture), None, None
    member: Member = picture.member
    spans = [(member.offset, picture.size), member.text, member.json]
    present = [span for span in spans if span]
    start, end = min(offset for offset, _ in present), max(offset + size for offset, size in present)
    store = open_store(picture.root)
    if end - start <= sum(size for _, size in present) + _TAR_GAPS:
        # They usually lie side by side: one request instead of three.
        data = store.read_range(member.container, start, end - start)
        parts = [data[span[0] - start : span[0] - start + span[1]] if span else None for span in spans]
    else:
        parts = [store.read_range(member.container, *span) if span else None for span in spans]
    return parts[0] or b"", parts[1], parts[2]


def _require_bytes(size: int, limits: ScanConfig) -> None:
    if size < limits.min_bytes:
        raise PictureError("too_few_bytes", f"{size} bytes < {limits.min_bytes}", failed=False)
    if size > limits.max_bytes:
        raise PictureError("too_many_bytes", f"{size} bytes > {limits.max_bytes}", failed=False)


def _describe(header: Header, size: int) -> dict[str, Any]:
    return {
        "format": header.format,
        "width": header.width,
        "height": header.height,
        "mode": header.mode,
        "jpeg_quality": header.jpeg_quality,
        "subsampling": header.subsampling,
        "bits_per_pixel": size * 8 / (header.width * header.height),
    }


def _require_header(row: dict[str, Any], limits: ScanConfig) -> None:
    """The gates of ``datagen.select`` that a header can answer, under the same names."""
    sides = sorted((row["width"], row["height"]))
    # Compared as stored in the inventory, so that the same limit in ``select`` gives the same verdict.
    density = float(np.float32(row["bits_per_pixel"]))
    if sides[0] < limits.min_side:
        raise PictureError("too_small", f"shorter_side {sides[0]} < {limits.min_side}", failed=False)
    if sides[1] / sides[0] > limits.max_aspect:
        raise PictureError("too_elongated", f"aspect {sides[1] / sides[0]:.4g} > {limits.max_aspect:g}", failed=False)
    if row["jpeg_quality"] is None:
        return
    if row["jpeg_quality"] < limits.min_jpeg_quality:
        message = f"jpeg_quality {row['jpeg_quality']} < {limits.min_jpeg_quality}"
        raise PictureError("low_jpeg_quality", message, failed=False)
    if density < limits.min_bits_per_pixel:
        message = f"jpeg_bits_per_pixel {density:.4g} < {limits.min_bits_per_pixel:g}"
        raise PictureError("low_bits_per_pixel", message, failed=False)


def _measure_pixels(pixels: np.ndarray, limits: ScanConfig) -> dict[str, Any]:
    grey = luma(pixels)
    measures = measure(grey)
    thumb = grey_thumb(grey)
    quality = math.nan
    if limits.niqe_patches:
        quality = niqe(grey, pristine_model(limits.niqe_model), limits.niqe_patches, measures.cells)
    return {
        "pixel_sha256": hashlib.sha256(pixels.data).hexdigest(),
        **{name: getattr(measures, name) for name in WHOLE_PICTURE_MEASURES},
        **{f"cell_{name}": getattr(measures.cells, name).reshape(-1) for name in WHOLE_PICTURE_MEASURES},
        "niqe": None if math.isnan(quality) else quality,
        "phash": hashes(thumb),
        "center_phash": int(center_hash(grey)),
        "grey_thumb": thumb.tobytes(),
        "thumbnail": _thumbnail(pixels),
    }


@functools.cache
def pristine_model(path: str | None) -> PristineModel:
    """The NIQE model of ``scan.niqe_model``, read once in a process."""
    return load_model(path)


def _thumbnail(pixels: np.ndarray) -> bytes:
    height, width = pixels.shape[:2]
    scale = min(1.0, THUMBNAIL_SIDE / max(height, width))
    small = area_mean(pixels, max(1, round(width * scale)), max(1, round(height * scale)))
    encoded = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 80])[1]
    return encoded.tobytes()
