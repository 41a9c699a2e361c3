"""Fit the pristine model of NIQE to the pictures of a source."""

from collections.abc import Iterator

import numpy as np

from datagen.config import DatagenConfig
from datagen.picture.decode import PictureError, decode, read_header
from datagen.picture.niqe import fit, save_model
from datagen.picture.quality import luma
from datagen.progress import Progress
from datagen.source.listing import SourceError, list_pictures, read_picture


def fit_niqe(config: DatagenConfig) -> str:
    """Write the model of the good pictures in ``config.source`` to the local file ``config.out``; returns its path.

    Raises:
        SourceError: there are none, too few sharp patches in them, or ``out`` is no local file name.
    """
    if "://" in config.out or not config.out.endswith(".json"):
        raise SourceError(f"out={config.out}: expected the name of a local file that ends in .json")
    pictures, _ = list_pictures(config.source)
    progress = Progress("fit-niqe", len(pictures), "images")

    def greys() -> Iterator[np.ndarray]:
        for picture in pictures:
            data = read_picture(picture)
            try:
                pixels, _ = decode(data, read_header(data, round(config.scan.max_megapixels * 1e6)))
            except PictureError as error:
                print(f"left out {picture.source}: {error}")
            else:
                yield luma(pixels)
            progress.advance(1)

    try:
        model = fit(greys(), fitted_from=", ".join(source.uri for source in config.source))
    except ValueError as error:
        raise SourceError(f"source {', '.join(source.uri for source in config.source)}: {error}") from None
    progress.finish()
    save_model(model, config.out)
    return config.out
