"""The trainer of cell type classifiers: its validation cells also calibrate it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from screformer.annotation.calibration_fit import calibrate
from screformer.train.calibration_record import write_calibration
from screformer.train.cell_trainer import CellTrainer


class CellTypeTrainer(CellTrainer):
    """A `CellTrainer` that calibrates the model (see `annotation.calibration`) by the last evaluation.

    Parameters
    ----------
    label_names
        Of all label ids, those of the classes first.
    compute_metrics
        Scores of an evaluation.
    *args, **kwargs
        As for `CellTrainer`.

    Attributes
    ----------
    calibration
        Record of one that the model has already, and keeps.
    """

    calibration: Mapping[str, Any] | None = None

    def __init__(
        self,
        *args: Any,  # Any: Trainer's own
        label_names: Sequence[str],
        compute_metrics: Callable[[Any], dict[str, float]],
        **kwargs: Any,
    ) -> None:
        self._label_names = np.array(label_names)
        self._score = compute_metrics
        self._predicted: tuple[np.ndarray, np.ndarray] | None = None
        super().__init__(*args, compute_metrics=self._remember, **kwargs)

    def _remember(self, prediction: Any) -> dict[str, float]:  # Any: transformers' EvalPrediction
        self._predicted = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        return self._score(prediction)

    def describe_evaluation(self, folder: Path) -> dict[str, Any]:
        """Calibrate, write ``calibration.json`` and ``calibration.png``, and return what metrics.json has of it."""
        record = self.calibration
        if record is None and self._predicted is not None:
            logits, ids = self._predicted
            labels = self._label_names[ids[ids >= 0]].tolist()
            record = calibrate(self.model.config, logits[ids >= 0], labels, fitted_to="validation cells")
        if record is None:
            return {}
        if self.is_world_process_zero():
            write_calibration(folder, record)
        temperatures = {
            f"temperature_of_level_{level}": value for level, value in enumerate(record["temperatures"], start=1)
        }
        return {**temperatures, "calibrated_on": record["fitted_to"]}
