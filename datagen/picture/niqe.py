"""NIQE, a quality score that needs no reference: how far a picture's local statistics lie from those of good ones.

Mittal, Soundararajan & Bovik, "Making a 'Completely Blind' Image Quality Analyzer", IEEE Signal Processing Letters
20(3), 2013. Luma is normalised by its local mean and deviation (section II-A, a 7x7 Gaussian window); in each patch of
96x96 pixels a generalized Gaussian is fitted to the result and asymmetric ones to the products of neighbours in four
directions (II-C), at full and at half resolution: 36 features. A multivariate Gaussian over the patches of a picture
is compared with the one of pristine pictures (II-E). Lower is better; a good photograph scores about 3 to 5.

The model that ships was fitted to what few photographs are at hand and free. It tells blurred, noisy and compressed
pictures from good ones; it does not rank good pictures among themselves, for which a model has to be fitted to
hundreds of them (``python -m datagen fit-niqe``).

What differs from the paper, so that scores are comparable among themselves but not with those of other programs:
the pristine model is fitted to other photographs (the file says which); half resolution is the mean of 2x2 pixels;
a neighbour's product counts only when both pixels lie in the patch; and where ``patches`` is given, only that many are
looked at, the ones in the sharpest cells of the quality map.
"""

import functools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import skimage

from datagen.picture.decode import decode, read_header
from datagen.picture.quality import CellMap, cell_edges, luma, measure
from infra.files import write_atomically

PATCH = 96
FEATURES = 36
PATCHES = 32
PRISTINE = Path(__file__).with_name("niqe_pristine.json")
# Significant digits of a saved model: below what a fit is sure of, above what another CPU's rounding changes.
_DIGITS = 6

_WINDOW = cv2.getGaussianKernel(7, 7 / 6, cv2.CV_32F)
# Twice the window's radius: at half resolution the window needs that much round a patch.
_HALO = 6
# Patches normalised together: their float32 planes fit a core's cache.
_TOGETHER = 8
# A patch is flat when fewer than this share of its pixels have that local deviation, in grey levels: there is nothing
# to describe but rounding.
_CONTRAST = 0.25
_MIN_CONTRAST = 0.1
# Share of the sharpest patch's sharpness (II-D) that a patch needs to count as pristine.
_SHARP = 0.75
# A patch with more of its pixels flat says nothing about sharpness or noise.
_MAX_FLAT = 0.95

# Photographs in scikit-image and what its documentation of ``skimage.data`` says of their rights.
_SHIPPED = {
    "astronaut.png": "NASA, public domain",
    "brick.png": "CC0",
    "camera.png": "CC0, Lav Varshney",
    "grass.png": "CC0",
    "gravel.png": "CC0",
    "hubble_deep_field.jpg": "NASA, public domain",
    "rocket.jpg": "SpaceX, public domain",
}
# So few photographs say more when they are looked at from several distances.
_SCALES = (1.0, 0.7, 0.5)


@dataclass(frozen=True)
class PristineModel:
    """The multivariate Gaussian of good pictures: ``mean`` [36] and ``covariance`` [36, 36], float64."""

    mean: np.ndarray
    covariance: np.ndarray
    fitted_from: str


def niqe(grey: np.ndarray, model: PristineModel, patches: int | None = PATCHES, cells: CellMap | None = None) -> float:
    """The score of a luma picture, uint8 ``[H, W]``: 0 and up, lower is better.

    Args:
        grey: the picture, at its own resolution.
        model: see :func:`load_model`.
        patches: look at no more than so many patches; None looks at all.
        cells: the picture's quality map, when it is at hand.

    Returns:
        NaN when fewer than two patches of 96x96 pixels can be described: too small a picture, or a flat one.
    """
    found = features(grey, patches, cells)
    if len(found) < 2:
        return math.nan
    difference = found.mean(axis=0) - model.mean
    pooled = (model.covariance + np.cov(found, rowvar=False)) / 2
    return math.sqrt(max(0.0, float(difference @ np.linalg.solve(pooled, difference))))


def features(grey: np.ndarray, patches: int | None = None, cells: CellMap | None = None) -> np.ndarray:
    """The features of a luma picture's patches, float64 ``[N, 36]``, in order of rows and columns.

    Patches lie side by side from the top left corner. With ``patches`` no more than so many are taken: the first by
    the mean Laplacian variance of the cells that they lie in, and of equals the upper left; patches in cells that are
    nearly all flat are left out. ``cells`` is the picture's quality map, measured here when it is not given. Patches
    of which not a tenth has a local deviation of 0.25 grey levels have no features and are always left out.
    """
    places = _grid(grey, PATCH)
    if patches is not None and len(places):
        places = _sharpest(places, grey, patches, measure(grey).cells if cells is None else cells)
    return _describe(grey, places)[0]


def fit(
    pictures: Iterable[np.ndarray], fitted_from: str = "", stride: int = PATCH, shrinkage: float = 0.0
) -> PristineModel:
    """Fit the model to the sharp patches of good luma pictures, each uint8 ``[H, W]``.

    A patch counts when its mean local deviation exceeds 0.75 of the largest in its picture.

    Args:
        pictures: hundreds, for the mean and covariance of 36 features to settle; what follows helps when they are few.
        fitted_from: which pictures these are; kept in the model.
        stride: pixels from patch to patch; below 96 they overlap.
        shrinkage: 0..1, by which the correlations of features are drawn towards none.

    Raises:
        ValueError: too few sharp patches to span 36 dimensions.
    """
    pristine = [np.empty((0, FEATURES))]
    for grey in pictures:
        found, sharpness = _describe(grey, _grid(grey, stride))
        pristine.append(found[sharpness > _SHARP * sharpness.max(initial=0.0)])
    found = np.concatenate(pristine)
    covariance = np.cov(found, rowvar=False) if len(found) > 1 else np.zeros((FEATURES, FEATURES))
    covariance = (1 - shrinkage) * covariance + shrinkage * np.diag(np.diag(covariance))
    if len(found) <= FEATURES or np.linalg.matrix_rank(covariance, hermitian=True) < FEATURES:
        raise ValueError(f"{len(found)} sharp patches of {PATCH}x{PATCH} pixels are too few for a model; add pictures")
    return PristineModel(found.mean(axis=0), covariance, fitted_from)


def fit_shipped() -> PristineModel:
    """Fit the model that ships anew, from photographs that scikit-image ships and that anybody may use."""
    folder = Path(skimage.__file__).parent / "data"
    pictures = []
    for name in _SHIPPED:
        data = (folder / name).read_bytes()
        grey = luma(decode(data, read_header(data, max_pixels=10**7))[0])
        height, width = grey.shape
        for scale in _SCALES:
            size = (round(width * scale), round(height * scale))
            pictures.append(grey if scale == 1 else cv2.resize(grey, size, interpolation=cv2.INTER_AREA))
    told = "; ".join(f"{name} ({licence})" for name, licence in _SHIPPED.items())
    scales = ", ".join(str(scale) for scale in _SCALES)
    return fit(
        pictures,
        f"Photographs of scikit-image: {told}. At scales {scales}, patches every 32 pixels, covariance shrunk by 0.1.",
        stride=32,
        shrinkage=0.1,
    )


def save_model(model: PristineModel, path: str | Path) -> None:
    """Write a model as JSON, its numbers rounded to 6 significant digits."""
    numbers = {"mean": _rounded(model.mean), "covariance": [_rounded(row) for row in model.covariance]}
    lines = [f' "{name}": {json.dumps(value)}' for name, value in {"fitted_from": model.fitted_from, **numbers}.items()]
    write_atomically(Path(path), ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def load_model(path: str | Path | None = None) -> PristineModel:
    """Read a saved model; None reads the one that ships with this package.

    Raises:
        ValueError: the file is no such model.
    """
    path = PRISTINE if path is None else Path(path)
    try:
        saved = json.loads(path.read_bytes())
        mean, covariance = (np.array(saved[name], dtype=np.float64) for name in ("mean", "covariance"))
        fitted_from = str(saved["fitted_from"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a NIQE model ({error}); fit one anew") from error
    if mean.shape != (FEATURES,) or covariance.shape != (FEATURES, FEATURES):
        raise ValueError(f"{path}: a NIQE model has {FEATURES} features, this one {mean.shape}, {covariance.shape}")
    return PristineModel(mean, covariance, fitted_from)


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in values]


def _grid(grey: np.ndarray, stride: int) -> np.ndarray:
    """Top left corners of the patches, int ``[N, 2]``, rows first."""
    down, across = (np.arange(0, length - PATCH + 1, stride) for length in grey.shape)
    return np.stack(np.meshgrid(down, across, indexing="ij"), axis=-1).reshape(-1, 2)


def _sharpest(places: np.ndarray, grey: np.ndarray, count: int, cells: CellMap) -> np.ndarray:
    shares = []
    for axis in (0, 1):
        edges = cell_edges(grey.shape[axis], cells.cell)
        first = places[:, axis, None]
        shares.append(np.clip(np.minimum(edges[1:], first + PATCH) - np.maximum(edges[:-1], first), 0, None) / PATCH)
    sharp, flat = (
        ((shares[0] @ per_cell) * shares[1]).sum(axis=1) for per_cell in (cells.laplacian_variance, cells.flat_fraction)
    )
    order = np.argsort(-sharp, kind="stable")
    return places[np.sort(order[flat[order] <= _MAX_FLAT][:count])]


def _describe(grey: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features, float64 ``[N, 36]``, and mean local deviation ``[N]`` of the patches that have contrast."""
    moments, means, shares = [np.empty((0, 2, 5, 4))], [np.empty(0)], [np.empty(0)]
    for i in range(0, len(places), _TOGETHER):
        windows = _windows(grey, places[i : i + _TOGETHER])
        full, deviation = _normalise(windows, _HALO)
        means.append(_row_means(deviation))
        shares.append(_row_means(deviation >= _CONTRAST))
        size = (windows.shape[1] // 2, windows.shape[0] // 2)
        half, _ = _normalise(cv2.resize(windows, size, interpolation=cv2.INTER_AREA), _HALO // 2)
        moments.append(np.stack([_moments(full), _moments(half)], axis=1))
    there = np.concatenate(shares) >= _MIN_CONTRAST
    return _fitted(np.concatenate(moments)[there]), np.concatenate(means)[there]


def _windows(grey: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The patches with a halo on every side, one below the other, float32 ``[N * 108, 108]``, zero at middle grey."""
    side = PATCH + 2 * _HALO
    result = np.empty((len(places), side, side), dtype=np.float32)
    for window, (y, x) in zip(result, places):
        top, left = max(0, y - _HALO), max(0, x - _HALO)
        inside = grey[top : y + PATCH + _HALO, left : x + PATCH + _HALO]
        above, before = top - (y - _HALO), left - (x - _HALO)
        below, after = side - above - inside.shape[0], side - before - inside.shape[1]
        window[:] = cv2.copyMakeBorder(inside, above, below, before, after, cv2.BORDER_REPLICATE)
    # Squares of levels round 0 leave float32 more digits for the variance.
    result -= 128
    return result.reshape(-1, side)


def _normalise(tall: np.ndarray, halo: int) -> tuple[np.ndarray, np.ndarray]:
    """Normalised luma of the patches stacked in ``tall`` and their local deviation, both float32 ``[N, h, h]``.

    The window reaches over into the next patch only within the halo, which is cut away.
    """
    side = tall.shape[1]
    inner = np.s_[:, halo : side - halo, halo : side - halo]
    mean = cv2.sepFilter2D(tall, cv2.CV_32F, _WINDOW, _WINDOW)
    square = cv2.sepFilter2D(cv2.multiply(tall, tall), cv2.CV_32F, _WINDOW, _WINDOW)
    variance = cv2.subtract(square, cv2.multiply(mean, mean), dst=square).reshape(-1, side, side)[inner]
    centre = cv2.subtract(tall, mean, dst=mean).reshape(-1, side, side)[inner]
    # Rounding can leave a variance of 0 a little below it.
    deviation = np.abs(variance)
    np.sqrt(deviation, out=deviation)
    return centre / (deviation + 1), deviation


def _moments(normal: np.ndarray) -> np.ndarray:
    """What the fits need of normalised patches ``[N, h, h]`` and of the products of neighbours, float64 ``[N, 5, 4]``.

    For each of the five maps the means of the absolute value, of the square and of the square with the value's sign,
    and the share of positive values.
    """
    maps = (
        normal,
        normal[:, :, :-1] * normal[:, :, 1:],
        normal[:, :-1] * normal[:, 1:],
        normal[:, :-1, :-1] * normal[:, 1:, 1:],
        normal[:, :-1, 1:] * normal[:, 1:, :-1],
    )
    result = np.empty((len(normal), 5, 4))
    for of_map, values in zip(result.transpose(1, 2, 0), maps):
        values = values.reshape(len(normal), -1)
        absolute = np.abs(values)
        of_map[0], of_map[3] = _row_means(absolute), _row_means(values > 0)
        of_map[1], of_map[2] = (np.vecdot(values, other) / values.shape[1] for other in (values, absolute))
    return result


def _row_means(values: np.ndarray) -> np.ndarray:
    """Means, float64 ``[N]``, of float32 or bool ``[N, ...]``."""
    rows = values.reshape(len(values), -1)
    if rows.dtype == bool:
        sums = cv2.reduce(rows.view(np.uint8), 1, cv2.REDUCE_SUM, dtype=cv2.CV_32S).reshape(-1)
    else:
        sums = rows @ np.ones(rows.shape[1], dtype=rows.dtype)
    return sums / float(rows.shape[1])


def _fitted(moments: np.ndarray) -> np.ndarray:
    """Features, float64 ``[N, 36]``, from moments ``[N, 2, 5, 4]``; a side without values has scale 0.

    Of the normalised luma the shape and scale of a generalized Gaussian (Sharifi & Leon-Garcia, IEEE TCSVT 5(1),
    1995); of each product shape, mean, left and right scale of an asymmetric one (Lasmar, Stitou & Berthoumieu,
    "Multiscale skewed heavy tailed model for texture analysis", ICIP 2009).
    """
    absolute, square, signed, positive = np.moveaxis(moments, -1, 0)
    left, right = (
        np.sqrt(np.maximum(part, 0) / (2 * np.maximum(share, 1e-9)))
        for part, share in ((square - signed, 1 - positive), (square + signed, positive))
    )
    # Equal sides make the asymmetric density the symmetric one, which is what the luma's is fitted with.
    left[..., 0] = right[..., 0] = np.sqrt(square[..., 0])
    # With ratio r of the sides: (r^3 + 1)(r + 1) / (r^2 + 1)^2, in a form that allows for one of 0.
    sides = (left**3 + right**3) * (left + right) / (left**2 + right**2) ** 2
    shape, to_scale, to_mean = _shape(absolute**2 / square * sides)
    left, right = left * to_scale, right * to_scale
    luma = np.stack([shape[..., 0], left[..., 0]], axis=-1)
    products = np.stack([shape, (right - left) * to_mean, left, right], axis=-1)[:, :, 1:]
    return np.concatenate([luma, products.reshape(-1, 2, 16)], axis=-1).reshape(-1, FEATURES)


def _shape(moments: np.ndarray) -> tuple[np.ndarray, ...]:
    """The shape a whose G(2/a)^2 / (G(1/a) G(3/a)) is ``moments``, with sqrt(G(1/a) / G(3/a)) and G(2/a) / G(1/a)."""
    known, shapes, to_scale, to_mean = _shape_table()
    return tuple(np.interp(moments, known, column) for column in (shapes, to_scale, to_mean))


@functools.cache
def _shape_table() -> np.ndarray:
    shapes = np.arange(0.2, 10.0005, 0.001)
    first, second, third = (np.array([math.lgamma(k / shape) for shape in shapes]) for k in (1, 2, 3))
    moments = np.exp(2 * second - first - third)
    return np.stack([moments, shapes, np.exp((first - third) / 2), np.exp(second - first)])
