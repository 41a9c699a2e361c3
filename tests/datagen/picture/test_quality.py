import cv2
import numpy as np
import pytest

from datagen.embedded import corpus_files
from datagen.picture.decode import decode, read_header
from datagen.picture.quality import CELL, cell_edges, luma, measure


@pytest.fixture(scope="module")
def grey() -> np.ndarray:
    data = corpus_files("pictures")["astronaut.png"]
    return luma(decode(data, read_header(data, 10**7))[0])


def test_laplacian_variance_is_that_of_the_definition(grey: np.ndarray) -> None:
    values = np.pad(grey.astype(np.int64), 1, mode="reflect")
    laplacian = values[:-2, 1:-1] + values[2:, 1:-1] + values[1:-1, :-2] + values[1:-1, 2:] - 4 * values[1:-1, 1:-1]
    assert measure(grey).laplacian_variance == pytest.approx(laplacian.var(), rel=1e-6)


def test_blur_lowers_sharpness_and_raises_flatness(grey: np.ndarray) -> None:
    sharp, blurred = measure(grey), measure(cv2.GaussianBlur(grey, (0, 0), 4))
    assert blurred.laplacian_variance < sharp.laplacian_variance / 20
    assert blurred.flat_fraction > sharp.flat_fraction


@pytest.mark.parametrize("sigma", [5, 15, 25])
def test_noise_is_estimated_within_a_fifth(grey: np.ndarray, sigma: int) -> None:
    smooth = np.full((512, 512), 120.0)
    noisy = np.clip(smooth + np.random.default_rng(0).normal(0, sigma, smooth.shape), 0, 255).astype(np.uint8)
    assert measure(noisy).noise == pytest.approx(sigma, rel=0.2)


@pytest.mark.parametrize("offset", [0, 3])
def test_blockiness_rises_with_compression_wherever_the_crop_begins(grey: np.ndarray, offset: int) -> None:
    coded = cv2.imdecode(cv2.imencode(".jpg", grey, [cv2.IMWRITE_JPEG_QUALITY, 10])[1], cv2.IMREAD_GRAYSCALE)
    assert measure(coded[offset:, offset:]).blockiness > 1.3
    assert measure(grey[offset:, offset:]).blockiness < 1.1


def test_extremes_of_exposure_and_entropy() -> None:
    white, black = (measure(np.full((64, 64), level, dtype=np.uint8)) for level in (255, 0))
    assert (white.overexposed, white.underexposed, white.entropy) == (1.0, 0.0, 0.0)
    assert (black.overexposed, black.underexposed, black.flat_fraction) == (0.0, 1.0, 1.0)
    ramp = np.tile(np.arange(256, dtype=np.uint8), (64, 1))
    assert measure(ramp).entropy == pytest.approx(8.0)


def test_cells_cover_the_picture_and_localise_detail() -> None:
    picture = np.full((CELL * 2 + 40, CELL * 3), 128, dtype=np.uint8)
    picture[CELL:, :CELL] += np.random.default_rng(0).integers(0, 60, (CELL + 40, CELL), dtype=np.uint8)
    cells = measure(picture).cells
    assert cells.laplacian_variance.shape == (2, 3)
    assert cells.laplacian_variance.argmax() == 3
    assert cells.flat_fraction[0, 2] == 1.0
    assert cell_edges(CELL * 2 + 40, CELL).tolist() == [0, CELL, CELL * 2 + 40]
    assert cell_edges(50, CELL).tolist() == [0, 50]
