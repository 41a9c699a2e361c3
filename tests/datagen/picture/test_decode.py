import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from datagen.picture.decode import PictureError, decode, read_header
from datagen.source.embedded import corpus_files
from tests.support.bad_pictures import display_p3_profile, linear_profile

MAX_PIXELS = 10**7


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.open(io.BytesIO(corpus_files("pictures")["astronaut.png"])).convert("RGB").resize((192, 128))


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> tuple[np.ndarray, tuple[str, ...]]:
    return decode(data, read_header(data, MAX_PIXELS))


def refusal(data: bytes, max_pixels: int = MAX_PIXELS) -> PictureError:
    with pytest.raises(PictureError) as caught:
        decode(data, read_header(data, max_pixels))
    return caught.value


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_give_the_stored_pixels_and_no_conversion(photo: Image.Image, format: str) -> None:
    pixels, conversions = decoded(encode(photo, format))
    np.testing.assert_array_equal(pixels, np.asarray(photo))
    assert conversions == ()


def test_jpeg_header_tells_quality_and_subsampling(photo: Image.Image) -> None:
    header = read_header(encode(photo, "JPEG", quality=83, subsampling=2), MAX_PIXELS)
    assert (header.format, header.width, header.height) == ("JPEG", 192, 128)
    assert (header.jpeg_quality, header.subsampling) == (83, "420")


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("L", ("grey_to_rgb",)),
        ("P", ("palette_to_rgb",)),
        ("LA", ("opaque_alpha_dropped", "grey_to_rgb")),
        ("RGBA", ("opaque_alpha_dropped",)),
    ],
)
def test_other_modes_become_rgb_and_say_so(photo: Image.Image, mode: str, expected: tuple[str, ...]) -> None:
    source = photo.convert("L").convert(mode) if mode == "LA" else photo.convert(mode)
    pixels, conversions = decoded(encode(source, "PNG"))
    np.testing.assert_array_equal(pixels, np.asarray(source.convert("RGB")))
    assert conversions == expected


def test_grey_jpeg_becomes_rgb(photo: Image.Image) -> None:
    pixels, conversions = decoded(encode(photo.convert("L"), "JPEG"))
    assert pixels.shape == (128, 192, 3)
    assert conversions == ("grey_to_rgb",)


def test_sixteen_bit_grey_is_scaled_to_eight(photo: Image.Image) -> None:
    grey = np.asarray(photo.convert("L"))
    pixels, conversions = decoded(encode(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"))
    np.testing.assert_array_equal(pixels[..., 1], grey)
    assert conversions == ("16bit_to_8bit", "grey_to_rgb")


def test_sixteen_bit_colour_is_reduced_and_says_so(photo: Image.Image) -> None:
    data = cv2.imencode(".png", np.asarray(photo)[..., ::-1].astype(np.uint16) * 257)[1].tobytes()
    pixels, conversions = decoded(data)
    np.testing.assert_array_equal(pixels, np.asarray(photo))
    assert conversions == ("16bit_to_8bit",)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation_is_applied(photo: Image.Image, format: str, orientation: int) -> None:
    turn = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_270],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_90],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels, conversions = decoded(encode(photo, format, exif=exif))
    plain, _ = decoded(encode(photo, format))
    np.testing.assert_array_equal(pixels, np.asarray(Image.fromarray(plain).transpose(turn[0])))
    assert conversions == ("exif_orientation",)


def test_foreign_profile_is_converted_and_srgb_left_alone(photo: Image.Image) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels, conversions = decoded(encode(photo, "PNG", icc_profile=srgb))
    np.testing.assert_array_equal(pixels, np.asarray(photo))
    assert conversions == ()
    assert decoded(corpus_files("pictures")["rocket.jpg"])[1] == ("icc_to_srgb",)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_profile_is_judged_by_what_it_does_and_not_by_its_name(photo: Image.Image, format: str) -> None:
    grey = photo.convert("L")
    profile = linear_profile("sRGB IEC61966-2.1")
    pixels, conversions = decoded(encode(grey, format, icc_profile=profile))
    assert conversions == ("grey_to_rgb", "icc_to_srgb")
    stored = decoded(encode(grey, format))[0].astype(float) / 255
    srgb = np.where(stored <= 0.0031308, 12.92 * stored, 1.055 * stored ** (1 / 2.4) - 0.055)
    np.testing.assert_allclose(pixels, srgb * 255, atol=1.5)


def test_display_p3_red_leaves_srgb_and_grey_stays(photo: Image.Image) -> None:
    """SMPTE EG 432-1: the red of Display P3 is beyond that of sRGB; its white and its curve are the same."""
    colours = Image.fromarray(np.array([[[200, 0, 0], [100, 100, 100], [180, 120, 90]]], np.uint8).repeat(40, 0))
    pixels, _ = decoded(encode(colours, "PNG", icc_profile=display_p3_profile()))
    red, grey, skin = pixels[0].astype(int)
    assert red[0] > 210 and red[1] == red[2] == 0
    np.testing.assert_allclose(grey, 100, atol=1)
    # By the matrices of the two spaces: linear P3 to XYZ to linear sRGB.
    np.testing.assert_allclose(skin, [190, 117, 84], atol=2)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_profiled_jpeg_has_the_pixels_of_one_without(photo: Image.Image, mode: str) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = decoded(encode(photo.convert(mode), "JPEG"))
    profiled = decoded(encode(photo.convert(mode), "JPEG", icc_profile=srgb))
    np.testing.assert_array_equal(profiled[0], plain[0])
    assert profiled[1] == plain[1]


def test_transparent_picture_is_refused(photo: Image.Image) -> None:
    clear = photo.copy()
    clear.putalpha(200)
    error = refusal(encode(clear, "PNG"))
    assert (error.reason, error.failed) == ("transparent", False)


@pytest.mark.parametrize("mode", ["CMYK", "1", "F"])
def test_modes_without_a_defined_look_are_refused(photo: Image.Image, mode: str) -> None:
    error = refusal(encode(photo.convert(mode), "TIFF"))
    assert (error.reason, error.failed) == ("unsupported_mode", False)


def test_animation_is_refused(photo: Image.Image) -> None:
    data = encode(photo, "GIF", save_all=True, append_images=[photo.rotate(90)])
    assert refusal(data).reason == "several_frames"


def test_too_many_pixels_are_refused_by_the_header_alone(photo: Image.Image) -> None:
    data = encode(photo, "PNG")  # Cut short: any decode of it would fail with another reason.
    assert refusal(data[: len(data) // 2], max_pixels=1000).reason == "too_many_pixels"


@pytest.mark.parametrize("data", [b"<html>not found</html>", b"\x89PNG", b"GIF89"], ids=["html", "png", "gif"])
def test_what_is_no_picture_fails(data: bytes) -> None:
    error = refusal(data)
    assert error.failed and error.reason in ("not_a_picture", "damaged")


def test_empty_file_fails() -> None:
    assert refusal(b"").reason == "empty"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.99, 0.9999])
def test_truncated_file_fails(photo: Image.Image, format: str, share: float) -> None:
    data = encode(photo, format)
    error = refusal(data[: int(len(data) * share)])
    assert error.failed and error.reason in ("damaged", "not_a_picture")


@pytest.mark.parametrize("profiled", [False, True])
def test_jpeg_with_bytes_flipped_in_its_scan_fails(photo: Image.Image, profiled: bool) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    options = {"icc_profile": srgb} if profiled else {}
    data = bytearray(encode(photo.resize((640, 480)), "JPEG", quality=95, **options))
    middle = len(data) // 2
    data[middle : middle + 400] = bytes(byte ^ 0xFF for byte in data[middle : middle + 400])
    assert refusal(bytes(data)).reason == "damaged"
