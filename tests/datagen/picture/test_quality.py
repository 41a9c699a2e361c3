import cv2
import numpy as np
import pytest
import simplejpeg

from datagen.picture.decode import decode, read_header
from datagen.picture.quality import CELL, WHOLE_PICTURE_MEASURES, Measures, cell_edges, luma, measure
from datagen.source.embedded import corpus_files


@pytest.fixture(scope="module")
def grey() -> np.ndarray:
    data = corpus_files("pictures")["astronaut.png"]
    return luma(decode(data, read_header(data, 10**7))[0])


def jpeg_copy(picture: np.ndarray, quality: int) -> np.ndarray:
    code = simplejpeg.encode_jpeg(np.ascontiguousarray(picture)[..., None], quality, "GRAY")
    return simplejpeg.decode_jpeg(code, "GRAY")[..., 0]


def reference(grey: np.ndarray, cell: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The measures written down from their definitions: of the picture and of its cells."""
    v = np.pad(grey.astype(np.float64), 1, mode="reflect")
    n, s, w, e, c = v[:-2, 1:-1], v[2:, 1:-1], v[1:-1, :-2], v[1:-1, 2:], v[1:-1, 1:-1]
    nw, ne, sw, se = v[:-2, :-2], v[:-2, 2:], v[2:, :-2], v[2:, 2:]
    laplacian = n + s + w + e - 4 * c
    flat = abs(ne + 2 * e + se - nw - 2 * w - sw) + abs(sw + 2 * s + se - nw - 2 * n - ne) < 16
    residual = abs(nw - 2 * n + ne - 2 * w + 4 * c - 2 * e + sw - 2 * s + se)
    down, across = (abs(np.diff(grey.astype(np.int64), axis=axis)) for axis in (0, 1))

    def figures(box: tuple[slice, slice]) -> dict[str, float]:
        share = np.bincount(grey[box].reshape(-1), minlength=256) / grey[box].size
        ratios = [1.0]
        for steps in (down[box].sum(axis=1), across[box].sum(axis=0)):
            phases = [steps[: len(steps) // 8 * 8][phase::8].sum() for phase in range(8)]
            rest = (sum(phases) - max(phases)) / 7
            ratios.append(max(phases) / rest if rest else 1.0)
        return {
            "laplacian_variance": laplacian[box].var(),
            "flat_fraction": flat[box].mean(),
            "blockiness": max(ratios),
            "entropy": -sum(p * np.log2(p) for p in share if p > 0),
            "noise": residual[box].mean() * np.sqrt(np.pi / 2) / 6,
            "overexposed": share[254:].sum(),
            "underexposed": share[:2].sum(),
        }

    rows, columns = (np.append(np.arange(max(1, length // cell)) * cell, length) for length in grey.shape)
    cells = {name: np.zeros((len(rows) - 1, len(columns) - 1)) for name in WHOLE_PICTURE_MEASURES}
    for i, j in np.ndindex(len(rows) - 1, len(columns) - 1):
        for name, value in figures(np.s_[rows[i] : rows[i + 1], columns[j] : columns[j + 1]]).items():
            cells[name][i, j] = value
    whole = figures(np.s_[:, :])
    whole["noise"] = np.percentile(cells["noise"], 10, method="lower")
    return whole, cells


def check(found: Measures, grey: np.ndarray, cell: int) -> None:
    whole, cells = reference(grey, cell)
    for name in WHOLE_PICTURE_MEASURES:
        assert getattr(found, name) == pytest.approx(whole[name], rel=1e-5, abs=1e-6), name
        values = getattr(found.cells, name)
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, cells[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("cell", [CELL, 64, 16])
@pytest.mark.parametrize(
    ("height", "width"), [(512, 512), (257, 389), (16, 16), (16, 400), (400, 16), (17, 255), (100, 60), (129, 256)]
)
def test_measures_are_those_of_their_definitions(grey: np.ndarray, height: int, width: int, cell: int) -> None:
    picture = grey[60 : 60 + height, 90 : 90 + width]
    check(measure(picture, cell), picture, cell)


def test_extreme_levels_do_not_overflow() -> None:
    checkers = (np.indices((150, 170)).sum(axis=0) % 2 * 255).astype(np.uint8)
    lines = np.tile(np.array([0, 255], dtype=np.uint8), (150, 80))
    noise = np.random.default_rng(0).choice(np.array([0, 255], dtype=np.uint8), (270, 300))
    for picture in (checkers, lines, lines.T, noise):
        check(measure(picture), picture, CELL)


def test_figures_do_not_depend_on_the_size_of_cells(grey: np.ndarray) -> None:
    coarse, fine = measure(grey, 256), measure(grey, 16)
    for name in set(WHOLE_PICTURE_MEASURES) - {"noise"}:
        assert getattr(coarse, name) == getattr(fine, name), name


@pytest.mark.parametrize("cell", [0, 8, 20, -16])
def test_a_cell_that_cuts_blocks_is_refused(cell: int) -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        measure(np.zeros((32, 32), dtype=np.uint8), cell)


def test_a_picture_without_a_whole_group_of_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="16 pixels"):
        measure(np.zeros((15, 32), dtype=np.uint8))


def test_blur_lowers_sharpness_and_raises_flatness(grey: np.ndarray) -> None:
    sharp, blurred = measure(grey), measure(cv2.GaussianBlur(grey, (0, 0), 4))
    assert blurred.laplacian_variance < sharp.laplacian_variance / 20
    assert blurred.flat_fraction > sharp.flat_fraction


@pytest.mark.parametrize("sigma", [5, 15, 25])
def test_noise_is_estimated_within_a_fifth(sigma: int) -> None:
    smooth = np.full((512, 512), 120.0)
    noisy = np.clip(smooth + np.random.default_rng(0).normal(0, sigma, smooth.shape), 0, 255).astype(np.uint8)
    found = measure(noisy)
    assert found.noise == pytest.approx(sigma, rel=0.2)
    np.testing.assert_allclose(found.cells.noise, sigma, rtol=0.2)


@pytest.mark.parametrize("offset", [0, 3])
def test_blockiness_rises_with_compression_wherever_the_crop_begins(grey: np.ndarray, offset: int) -> None:
    coded = jpeg_copy(grey, 10)
    assert measure(coded[offset:, offset:]).blockiness > 1.3
    assert measure(grey[offset:, offset:]).blockiness < 1.1
    assert measure(coded[offset:, offset:]).cells.blockiness.min() > 1.2


def test_extremes_of_exposure_and_entropy() -> None:
    white, black = (measure(np.full((64, 64), level, dtype=np.uint8)) for level in (255, 0))
    assert (white.overexposed, white.underexposed, white.entropy) == (1.0, 0.0, 0.0)
    assert (black.overexposed, black.underexposed, black.flat_fraction) == (0.0, 1.0, 1.0)
    ramp = np.tile(np.arange(256, dtype=np.uint8), (64, 1))
    assert measure(ramp).entropy == pytest.approx(8.0)


def test_cells_cover_the_picture_and_localise_detail() -> None:
    picture = np.full((CELL * 2 + 40, CELL * 3), 128, dtype=np.uint8)
    picture[CELL:, :CELL] += np.random.default_rng(0).integers(0, 60, (CELL + 40, CELL), dtype=np.uint8)
    picture[:64, -64:] = 255
    cells = measure(picture).cells
    for name in WHOLE_PICTURE_MEASURES:
        assert getattr(cells, name).shape == (2, 3)
    for name in ("laplacian_variance", "entropy"):
        assert getattr(cells, name).argmax() == 3
    np.testing.assert_array_equal(cells.overexposed, [[0, 0, 0.25], [0, 0, 0]])
    assert cells.flat_fraction[1, 2] == 1.0
    assert cell_edges(CELL * 2 + 40, CELL).tolist() == [0, CELL, CELL * 2 + 40]
    assert cell_edges(50, CELL).tolist() == [0, 50]
