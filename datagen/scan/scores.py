"""Learned scores of the user's own (NIMA, HyperIQA …): ``scan.scores: {name: "module:function"}``.

The function is called with the upright sRGB pixels, uint8 ``[height, width, 3]``, and returns one finite number. What
it needs once (weights, a session) it loads when its module is imported or when it is first called: a worker keeps it
for all its pictures.
"""

import functools
import importlib
import math
import socket
from collections.abc import Callable, Mapping

import numpy as np

from datagen.picture.decode import PictureError
from infra.config import ConfigError

Score = Callable[[np.ndarray], float]


def require_scores(scores: Mapping[str, str]) -> None:
    """Import every function in this process, so that a wrong name is refused before any picture is read.

    Raises:
        ConfigError: naming the key, the host and what could not be imported.
    """
    for name, target in scores.items():
        try:
            load_score(target)
        except ConfigError as error:
            raise ConfigError(f"scan.scores.{name}: {error}") from None


@functools.cache
def load_score(target: str) -> Score:
    """The function that ``module:function`` names, imported once in a process.

    Raises:
        ConfigError: there is none, or its module fails to import.
    """
    module, _, attribute = target.partition(":")
    if not module or not attribute:
        raise ConfigError(f"{target!r}: expected module:function, for example my_scores.nima:score")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # Whatever a user's module raises when it is imported.
        raise ConfigError(
            f"{target!r} cannot be imported on {socket.gethostname()} ({type(error).__name__}: {error}); "
            "the module must be installed, or on PYTHONPATH, on every node"
        ) from None
    if not callable(function):
        raise ConfigError(f"{target!r}: is a {type(function).__name__}, not a function")
    return function


def score(pixels: np.ndarray, scores: Mapping[str, str]) -> list[tuple[str, float]]:
    """(name, score), by name, of a picture, uint8 RGB ``[H, W, 3]``.

    Raises:
        PictureError: ``score_failed``: a function raised, or returned no finite number.
    """
    return [(name, _score(pixels, name, target)) for name, target in sorted(scores.items())]


def _score(pixels: np.ndarray, name: str, target: str) -> float:
    function = load_score(target)
    try:
        value = float(function(pixels))
    except Exception as error:  # Whatever a user's function raises.
        raise PictureError("score_failed", f"{name}: {type(error).__name__}: {error}", failed=True) from None
    if not math.isfinite(value):
        raise PictureError("score_failed", f"{name}: returned {value}", failed=True)
    return value
