"""What MLflow runs of a registered model: this file is copied into it, with the modules that it imports.

``predict`` takes pictures as uint8 [N, H, W, 3], which is what Pillow and OpenCV give and a third of the JSON that
floats would be, and returns uint8 [N, scale H, scale W, 3]: the very pixels that ``ird restore`` writes into a PNG.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from pipeline.inference import RestoreOptions, load_model, offered_options, restore_array
from pipeline.samples import to_float, to_integers


class RestorationModel(PythonModel):
    """All variants of one network behind MLflow's generic interface."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the export that travels with the model."""
        self._model = load_model(Path(context.artifacts["export"]))
        allowed = tuple(sorted(offered_options(self._model.config, self._model.metadata)))
        logging.getLogger("mlflow.models.utils").addFilter(_RefuseUnknownParams(allowed))

    def predict(
        self, context: PythonModelContext, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        """Restore a batch of pictures; see the module for their shapes, ``RestoreOptions`` for ``params``.

        Raises:
            MlflowException: INVALID_PARAMETER_VALUE (HTTP 400) for params or pictures that do not suit the model.
        """
        pictures = np.asarray(model_input)
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or 0 in pictures.shape:
            message = f"expected pictures as uint8 [N, H, W, 3], got {pictures.dtype} {list(pictures.shape)}"
            raise MlflowException.invalid_parameter_value(message)
        try:
            options = RestoreOptions(**(params or {}))
            restored = [restore_array(self._model, to_float(picture), options) for picture in pictures]
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        return np.stack([to_integers(picture) for picture in restored])


@dataclass(frozen=True)
class _RefuseUnknownParams:
    """Turns MLflow's warning into an error: it drops a param that is not in the schema before the model sees it.

    A mistyped ``varient="small"`` would otherwise silently give another variant than was asked for. The
    warning names the params of the model that was called, so that other models in the process are left alone.
    """

    allowed: tuple[str, ...]

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if message.startswith("Unrecognized params"):
            given, _, supported = message.partition("Supported params are: ")
            names = supported.partition("}")[0].strip("{").replace("'", "").split(", ")
            if tuple(sorted(names)) == self.allowed:
                unknown = given[given.index("[") : given.index("]") + 1]
                raise MlflowException.invalid_parameter_value(
                    f"unknown params {unknown}; allowed: {', '.join(self.allowed)}"
                )
        return True


set_model(RestorationModel())
