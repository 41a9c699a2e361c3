"""What reasons, measures and conversions are called, and what they mean, in words for people."""

from typing import NamedTuple

from datagen.progress import spoken


class Measure(NamedTuple):
    """How a measure is shown. ``log``: its axis is logarithmic; ``whole``: its values are whole numbers."""

    title: str
    unit: str
    meaning: str
    log: bool = False
    whole: bool = False


# In the order of the page. Names are those of ``datagen.select.gates.measures`` and of ``corpus.SIZES``.
MEASURES = {
    "shorter_side": Measure("Shorter side", "pixels", "of the upright picture", log=True, whole=True),
    "aspect": Measure("Aspect ratio", "", "longer side over shorter side", log=True),
    "megapixels": Measure("Picture size", "megapixels", "width times height", log=True),
    "kilobytes": Measure("File size", "kB", "of the file as it came", log=True),
    "jpeg_quality": Measure("JPEG quality", "", "read from the quantisation tables, on libjpeg's scale", whole=True),
    "jpeg_bits_per_pixel": Measure("Bits per pixel, JPEG", "", "file size over pixels"),
    "bits_per_pixel": Measure("Bits per pixel, all formats", "", "file size over pixels"),
    "laplacian_variance": Measure("Sharpness", "", "variance of the Laplacian; low means blurred", log=True),
    "flat_fraction": Measure("Flat area", "share", "pixels with hardly any gradient"),
    "entropy": Measure("Entropy", "bits", "of the histogram of grey levels"),
    "blockiness": Measure("Blockiness", "", "steps at borders of 8x8 blocks over steps elsewhere; 1 has no blocks"),
    "noise": Measure("Noise", "grey levels", "standard deviation where there is least texture"),
    "niqe": Measure("NIQE", "", "distance from the statistics of good photographs; low is good"),
    "overexposed": Measure("Overexposed area", "share", "pixels at 254 or 255"),
    "underexposed": Measure("Underexposed area", "share", "pixels at 0 or 1"),
}

_REASONS = {
    "too_few_bytes": ("Too few bytes", "file smaller than scan.min_bytes, not read"),
    "too_many_bytes": ("Too many bytes", "file larger than scan.max_bytes, not read"),
    "too_many_pixels": ("Too many pixels", "more than scan.max_megapixels, not decoded"),
    "too_small": ("Too small", "a side is too short"),
    "too_elongated": ("Too elongated", "the longer side is too many times the shorter one"),
    "unsupported_format": ("Unsupported format", "a kind of file that is not read"),
    "unsupported_mode": ("Unsupported colour mode", "CMYK, float and the like"),
    "several_frames": ("Several frames", "animated, or several pages"),
    "too_many_scans": ("Too many scans", "a progressive JPEG made to be slow"),
    "metadata_too_large": ("Metadata too large", "text or a profile that inflates beyond reason"),
    "transparent": ("Transparent", "blending it would invent edges"),
    "removed": ("Taken down", "on request; nothing of them is shown or kept"),
    "leak": ("Leak of an evaluation picture", "shows a picture of the leak guard, whole or in part"),
    "low_jpeg_quality": ("Low JPEG quality", "saved with too coarse a quantisation"),
    "low_bits_per_pixel": ("Too few bits a pixel", "a JPEG squeezed too hard"),
    "flat": ("Flat", "hardly any texture"),
    "blurred": ("Blurred", "no sharp detail"),
    "low_entropy": ("Low entropy", "few grey levels"),
    "blocky": ("JPEG blocks", "borders of 8x8 blocks show"),
    "noisy": ("Noisy", "noise even where there is no texture"),
    "high_niqe": ("High NIQE", "unlike good photographs in its statistics"),
    "overexposed": ("Overexposed", "too much of it is white"),
    "underexposed": ("Underexposed", "too much of it is black"),
    "exact_duplicate": ("Exact duplicate", "the same file or the same pixels as a kept picture"),
    "near_duplicate": ("Near duplicate", "looks like a kept picture, in any of eight orientations"),
    "no_good_tile": ("No good tile", "large, but each of its tiles is blurred or flat"),
    "empty": ("Empty file", "no byte in it"),
    "not_a_picture": ("Not a picture", "nothing that is known by its first bytes"),
    "damaged": ("Damaged file", "cut, changed, or without its end"),
    "out_of_memory": ("Out of memory", "memory ran out while it was read"),
    "missing": ("Missing file", "listed, but gone when it was to be read"),
    "unreadable": ("Unreadable file", "the store refused to give it"),
    "measure_failed": ("Measuring failed", "an error that no check foresaw"),
    "worker_died": ("Worker died", "the process that measured it ended, every time"),
}

# The order in which ``datagen.select`` asks; the scan comes before all of it.
ORDER = (
    *("leak", "too_small", "too_elongated", "low_jpeg_quality", "low_bits_per_pixel", "flat", "blurred"),
    *("low_entropy", "blocky", "noisy", "high_niqe", "overexposed", "underexposed"),
)
ORDER_AFTER_SCORES = ("exact_duplicate", "near_duplicate", "no_good_tile", "removed")

CONVERSIONS = {
    "opaque_alpha_dropped": "alpha channel dropped that was opaque everywhere",
    "grey_to_rgb": "grey to RGB",
    "palette_to_rgb": "palette to RGB",
    "16bit_to_8bit": "16 bits a sample to 8",
    "extra_channels_dropped": "further TIFF channels dropped",
    "exif_orientation": "turned upright as its EXIF orientation says",
    "icc_to_srgb": "converted to sRGB from its ICC profile",
    "icc_ignored": "ICC profile ignored that is broken or not of RGB",
}


def plain(name: str) -> str:
    """A name of the code as words."""
    return name.replace("_", " ").capitalize()


def measure_words(name: str) -> Measure:
    """How to show a measure; a learned score is shown by its name."""
    if name in MEASURES:
        return MEASURES[name]
    return Measure(f"Score {name.removeprefix('score_')}", "", "a learned score of scan.scores")


def reason_title(reason: str) -> str:
    """Name of a reason; one that is not known here is spelled from its code."""
    if reason.startswith("score_"):
        return f"Score {reason.removeprefix('score_')}"
    return _REASONS.get(reason, (plain(reason), ""))[0]


def reason_meaning(reason: str) -> str:
    """What a reason means in a few words; empty for one that is not known here."""
    if reason.startswith("score_"):
        return "a learned score outside its limits"
    return _REASONS.get(reason, ("", ""))[1]


def plural(number: int, word: str) -> str:
    """``1 picture``, ``2,000 pictures``."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """``0.8 s``, ``8 s``, ``2 min 13 s``, ``1 h 04 min``."""
    return f"{seconds:.1f} s" if seconds < 9.95 else spoken(seconds)


def size(number: float) -> str:
    """Bytes in decimal units: ``512 B``, ``3.3 MB``, ``1.2 TB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} TB" if number < 999.5 else f"{number:,.0f} TB"
