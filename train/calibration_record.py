"""What a calibration leaves in a folder: its record, and the figure of probabilities beside what came true."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from screformer.train.figures import COLORS, FONT_SIZE, new_figure, save_figure, shorten
from screformer.train.result_files import write_json

CALIBRATION_FILE, CALIBRATION_FIGURE = "calibration.json", "calibration.png"
MAX_MARKER_AREA = 160.0


def write_calibration(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record of `annotation.calibration_fit.calibrate` as JSON, and draw ``calibration.png``."""
    write_json(folder / CALIBRATION_FILE, record)
    plot_reliability(record["levels"], folder / CALIBRATION_FIGURE, title=f"Calibration on {record['fitted_to']}")


def plot_reliability(
    levels: Sequence[Mapping[str, Any]], path: str | Path, *, title: str = "Probabilities and what came true"
) -> None:
    """Draw a panel a level: share of right labels by their probability; the area of a mark is its number of cells.

    Parameters
    ----------
    levels
        Rows of `annotation.calibration_fit.describe_calibration`.
    path
        PNG file to write.
    title
        Headline.
    """
    figure, first = new_figure(3.6 * len(levels) + 0.6, 4.2, num_panels=len(levels))
    for axes, row in zip(figure.axes, levels, strict=True):
        _draw_reliability(axes, row["reliability"])
        axes.set_title(
            f"Level {row['level']}, {row['num_cells']:,} cells\n"
            f"calibration error {row['expected_calibration_error']:.3f} (before {row['before']:.3f})",
            fontsize=FONT_SIZE,
        )
    first.set_ylabel("Share of cells with that label")
    figure.suptitle(title)
    save_figure(figure, path)


def plot_reliability_of_systems(
    systems: Mapping[str, tuple[Sequence[Mapping[str, float]], float]], path: str | Path, *, title: str
) -> None:
    """Draw a panel a system, as `plot_reliability`.

    Parameters
    ----------
    systems
        Title -> bins of `train.metrics.reliability_bins`, and the expected calibration error.
    path
        PNG file to write.
    title
        Headline.
    """
    figure, first = new_figure(3.6 * len(systems) + 0.6, 4.2, num_panels=len(systems))
    for axes, (name, (bins, error)) in zip(figure.axes, systems.items(), strict=True):
        _draw_reliability(axes, bins)
        axes.set_title(f"{shorten(name)}\ncalibration error {error:.3f}", fontsize=FONT_SIZE)
    first.set_ylabel("Share of cells with that label")
    figure.suptitle(title)
    save_figure(figure, path)


def _draw_reliability(axes: Axes, bins: Sequence[Mapping[str, float]]) -> None:
    cells = np.array([one["num_cells"] for one in bins])
    xs, ys = ([one[name] for one in bins] for name in ("mean_probability", "accuracy"))
    axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1)
    axes.plot(xs, ys, color=COLORS[0], linewidth=1.2)
    axes.scatter(xs, ys, s=8 + MAX_MARKER_AREA * cells / cells.max(), color=COLORS[0], alpha=0.7, zorder=3)
    axes.set_xlim(0, 1.03)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("Probability of the label")
