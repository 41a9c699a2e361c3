"""From an encoded picture to training patches: where a crop is cut, and how it is turned."""

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np

from datagen.picture.region import decode_regions, decode_whole, picture_size

LEAST_ACCEPTANCE = 0.05
"""Flat regions are not left out: a network must learn to leave a clear sky alone. An own choice."""

_TRIES = 8
_TURNS = {1: cv2.ROTATE_90_COUNTERCLOCKWISE, 2: cv2.ROTATE_180, 3: cv2.ROTATE_90_CLOCKWISE}


def decode_depth(data: bytes) -> np.ndarray:
    """A depth map of 8 or 16 bits, as float32 [H,W] in [0, 1], 0 the nearest.

    Raises:
        ValueError: OpenCV cannot read it, or it has several channels.
    """
    depth = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if depth is None or depth.ndim != 2 or depth.dtype not in (np.uint8, np.uint16):
        raise ValueError("not a depth map: expected one channel of 8 or 16 bits")
    return depth.astype(np.float32) / np.float32(255 if depth.dtype == np.uint8 else 65535)


@dataclass(frozen=True)
class DetailMap:
    """Which share of each cell of a picture is not flat: ``share`` float64 [rows, columns], ``cell`` its side in px."""

    share: np.ndarray
    cell: int

    def inside(self, top: int, left: int, patch: int) -> float:
        """Mean share over the patch x patch pixels at (top, left), cells weighted by how much of them it covers."""
        rows, columns = (_overlap(start, patch, self.cell, n) for start, n in zip((top, left), self.share.shape))
        return float(rows @ self.share @ columns / (rows.sum() * columns.sum()))


def detail_map(metadata: bytes) -> DetailMap | None:
    """The ``quality_map`` that ``datagen pack`` writes into ``<key>.json``, or None where there is none."""
    facts: dict[str, Any] = json.loads(metadata) if metadata else {}
    found = facts.get("quality_map") if isinstance(facts, dict) else None
    if not found:
        return None
    flat = np.array(found["flat_fraction"], dtype=np.float64).reshape(found["rows"], found["columns"])
    return DetailMap(1 - flat, int(found["cell"]))


class Place(NamedTuple):
    """A patch in a picture: its top left pixel, and which of the eight orientations it is turned to."""

    top: int
    left: int
    orientation: int


def draw_place(height: int, width: int, patch: int, rng: np.random.Generator, detail: DetailMap | None = None) -> Place:
    """A random patch in a picture of at least patch x patch pixels.

    Uniform without ``detail``; with it a place is as likely as the share of the patch there that is not flat, but
    never less than ``LEAST_ACCEPTANCE`` of the likeliest.
    """
    orientation = int(rng.integers(8))
    for _ in range(_TRIES if detail is not None else 1):
        top, left = int(rng.integers(height - patch + 1)), int(rng.integers(width - patch + 1))
        if detail is None or rng.random() < max(detail.inside(top, left, patch), LEAST_ACCEPTANCE):
            break
    return Place(top, left, orientation)


def turn(patch: np.ndarray, orientation: int) -> np.ndarray:
    """A [P,P] or [P,P,3] array in orientation 0 … 7: quarter turns to the left, then mirrored from 4 on."""
    # OpenCV copies block by block; numpy's turned views would cost twenty times as much when they are stacked.
    turned = patch if orientation % 4 == 0 else cv2.rotate(patch, _TURNS[orientation % 4])
    return cv2.flip(turned, 1) if orientation >= 4 else turned


def cut_patches(
    picture: bytes,
    depth: bytes,
    patch: int,
    count: int,
    rng: np.random.Generator,
    detail: DetailMap | None = None,
) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
    """``count`` patches from an encoded picture, and the same places of its depth map where it has one.

    Only what the patches need is decoded where the format allows. A picture smaller than ``patch`` is mirrored
    outwards. Returns uint8 [P,P,3] and float32 [P,P] in [0, 1], which may be views.

    Raises:
        ValueError: the picture or its depth map cannot be decoded, or their sizes differ.
    """
    size = picture_size(picture)
    height, width = (max(side, patch) for side in size)
    places = [draw_place(height, width, patch, rng, detail) for _ in range(count)]
    if size == (height, width):
        crops = decode_regions(picture, [(place.top, place.left, patch, patch) for place in places])
    else:
        whole = _at_least(decode_whole(picture), patch)
        crops = [_cut(whole, place, patch) for place in places]
    crops = [turn(crop, place.orientation) for crop, place in zip(crops, places)]
    if not depth:
        return crops, None
    distances = _at_least(decode_depth(depth), patch)
    if distances.shape != (height, width):
        raise ValueError(f"the depth map is {distances.shape[1]}x{distances.shape[0]}, its picture {width}x{height}")
    return crops, [turn(_cut(distances, place, patch), place.orientation) for place in places]


def _cut(pixels: np.ndarray, place: Place, patch: int) -> np.ndarray:
    return pixels[place.top : place.top + patch, place.left : place.left + patch]


def _at_least(picture: np.ndarray, patch: int) -> np.ndarray:
    bottom, right = (max(patch - side, 0) for side in picture.shape[:2])
    if not bottom and not right:
        return picture
    return np.pad(picture, ((0, bottom), (0, right), *[(0, 0)] * (picture.ndim - 2)), mode="symmetric")


def _overlap(start: int, length: int, cell: int, cells: int) -> np.ndarray:
    """Pixels of start … start + length - 1 in each of ``cells`` cells; what is beyond the last belongs to it."""
    edges = np.arange(cells + 1, dtype=np.float64) * cell
    edges[-1] = np.inf
    covered = np.minimum(edges[1:], start + length) - np.maximum(edges[:-1], start)
    return np.clip(covered, 0, None)
