"""One picture becomes one inventory row: measured, or with the reason why not."""

import hashlib
from typing import Any

import cv2
import numpy as np

from datagen.config import ScanConfig
from datagen.picture.decode import Header, PictureError, decode, read_header
from datagen.picture.perceptual_hash import grey_thumb, hashes
from datagen.picture.quality import WHOLE_PICTURE_MEASURES, luma, measure
from datagen.scan.inventory import INVENTORY_SCHEMA
from datagen.source.listing import Picture, read_picture
from infra.storage import NotFoundError, StorageError

THUMBNAIL_SIDE = 160


def row_of(picture: Picture, limits: ScanConfig, batch: int) -> dict[str, Any]:
    """The row, ``datagen.scan.inventory.INVENTORY_SCHEMA``, of one picture of a listing. Never raises for its sake."""
    row: dict[str, Any] = dict.fromkeys(INVENTORY_SCHEMA.names)
    row |= {"source": picture.source, "root": picture.root, "key": picture.key, "licence": picture.licence}
    row |= {"bytes": picture.size, "version": picture.version, "batch": batch}
    row |= {"verdict": "failed", "stage": "read", "reason": picture.fault}
    if picture.member:
        row |= {"container": picture.member.container, "offset": picture.member.offset}
    if picture.fault:
        return row
    try:
        data = read_picture(picture)
    except NotFoundError as error:
        return row | {"reason": "missing", "error": str(error)}
    except StorageError as error:
        return row | {"reason": "unreadable", "error": str(error)}
    return row | measure_picture(data, limits)


def measure_picture(data: bytes, limits: ScanConfig) -> dict[str, Any]:
    """What the bytes of a file say, stage by stage, the cheapest first: a picture refused early keeps what was learnt.

    Returns:
        the columns from ``bytes`` on; ``verdict`` is measured, rejected (by a limit) or failed (by damage).
    """
    row: dict[str, Any] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "stage": "header"}
    try:
        header = read_header(data, round(limits.max_megapixels * 1e6))
        row |= _describe(header, len(data))
        _require_size(header, limits)
        row["stage"] = "decode"
        pixels, conversions = decode(data, header)
        row |= {"width": pixels.shape[1], "height": pixels.shape[0], "conversions": conversions, "stage": "measure"}
        row |= _measure_pixels(pixels)
    except PictureError as error:
        verdict = "failed" if error.failed else "rejected"
        return row | {"verdict": verdict, "reason": error.reason, "error": str(error)}
    return row | {"verdict": "measured", "reason": ""}


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


def _require_size(header: Header, limits: ScanConfig) -> None:
    if min(header.width, header.height) < limits.min_side:
        message = f"{header.width}x{header.height}, below {limits.min_side} pixels"
        raise PictureError("too_small", message, failed=False)


def _measure_pixels(pixels: np.ndarray) -> dict[str, Any]:
    grey = luma(pixels)
    measures = measure(grey)
    thumb = grey_thumb(grey)
    cells = {f"cell_{name}": getattr(measures.cells, name, None) for name in WHOLE_PICTURE_MEASURES}
    return {
        "pixel_sha256": hashlib.sha256(pixels.data).hexdigest(),
        **{name: getattr(measures, name) for name in WHOLE_PICTURE_MEASURES},
        **{name: None if values is None else values.reshape(-1) for name, values in cells.items()},
        "phash": hashes(thumb),
        "grey_thumb": thumb.tobytes(),
        "thumbnail": _thumbnail(pixels),
    }


def _thumbnail(pixels: np.ndarray) -> bytes:
    height, width = pixels.shape[:2]
    scale = min(1.0, THUMBNAIL_SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    encoded = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 80])[1]
    return encoded.tobytes()
