import io

import numpy as np
import pytest
from PIL import Image

from datagen.picture.jpeg import count_scans, estimate_quality, read_frame
from tests.support.bad_pictures import encode, photo, scans_of


@pytest.mark.parametrize("quality", [5, 30, 49, 50, 75, 92, 100])
def test_quality_of_an_ijg_encoder_is_found_exactly(quality: int) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8)).save(buffer, "JPEG", quality=quality)
    assert estimate_quality(Image.open(buffer).quantization) == quality


def test_frame_and_scans_are_those_of_the_picture_and_not_of_its_thumbnail() -> None:
    progressive = encode(photo(), "JPEG", progressive=True)
    thumbnail = encode(photo().resize((32, 32)), "JPEG")
    segment = b"\xff\xe2" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    data = progressive[:2] + segment + progressive[2:] + thumbnail
    assert read_frame(data) == (0xC2, 8, 128, 192, 3)
    assert count_scans(data) == len(scans_of(progressive)) > 5
    assert read_frame(encode(photo().convert("L"), "JPEG")) == (0xC0, 8, 128, 192, 1)


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd8\xff\xc0\0\x03\x08", b"\xff\xd8text"])
def test_a_broken_jpeg_has_no_frame(data: bytes) -> None:
    assert read_frame(data) is None
    assert count_scans(data) == 0
