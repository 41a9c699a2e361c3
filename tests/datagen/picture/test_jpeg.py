import io

import numpy as np
import pytest
from PIL import Image

from datagen.picture.jpeg import estimate_quality


@pytest.mark.parametrize("quality", [5, 30, 49, 50, 75, 92, 100])
def test_quality_of_an_ijg_encoder_is_found_exactly(quality: int) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8)).save(buffer, "JPEG", quality=quality)
    assert estimate_quality(Image.open(buffer).quantization) == quality
