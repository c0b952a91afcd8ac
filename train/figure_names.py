"""Names beside the points of a figure, so placed that none covers another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

Pixels = npt.NDArray[np.float64]

DISTANCES = (
    10,
    16,
    22,
    28,
    36,
    46,
    58,
    72,
    88,
    106,
    128,
    155,
)  # points from the mark to the middle of the name's nearer edge
NUM_DIRECTIONS = 24
MARK_SIZE = 6.0  # half a mark's side, with a margin
NAME_MARGIN = 1.5
LINE_FROM = 20  # a name that is this far has a line to its mark
CLEARER = 2.5  # how many times farther from a name other marks must be than its own, or there is a line
NUM_LINE_POINTS = 24


class _Place(NamedTuple):
    """Where a name may stand: by how many points it is moved, its box in pixels, and whether a line leads to it."""

    shift: tuple[float, float]
    box: Bbox
    has_line: bool


def name_points(axes: Axes, points: Mapping[str, tuple[float, float]], *, size: float) -> None:
    """Write each point's name beside it, the nearest place first that covers no mark and no other name.

    A line leads from a mark to its name where that stands away, or nearer to another mark. Where there is no free
    place, the one that covers least is taken. Call it last, when limits and titles are set.

    Parameters
    ----------
    axes
        With the marks.
    points
        Name -> place in data coordinates.
    size
        Of the letters.
    """
    axes.figure.draw_without_rendering()  # type: ignore[union-attr] # figure of these axes; its layout settles
    frame = axes.get_window_extent()
    marks = {name: np.asarray(axes.transData.transform(place)) for name, place in points.items()}
    margin = MARK_SIZE * axes.figure.dpi / 72
    taken = {name: Bbox.from_extents(*(mark - margin), *(mark + margin)) for name, mark in marks.items()}
    names: list[Bbox] = []
    lines: list[Pixels] = []
    for name in sorted(points, key=lambda name: _gap_to_next(marks, name)):  # the crowded ones choose first
        text = axes.annotate(
            name, points[name], (0, 0), textcoords="offset points", fontsize=size, ha="center", va="center"
        )
        text.set_in_layout(False)
        others = [*(box for other, box in taken.items() if other != name), *names]
        best, least = None, np.inf
        for candidate in _places(text.get_window_extent(), marks, name, axes.figure.dpi / 72):
            covered = _outside(candidate.box, frame) + sum(
                _overlap(candidate.box, box) for box in [*others, taken[name]]
            )
            covered += sum(_num_inside(candidate.box, line) for line in lines)
            if candidate.has_line:
                covered += sum(_num_inside(box, _line(candidate.box, marks[name])) for box in others)
            if covered < least:
                best, least = candidate, covered
            if not covered:
                break
        assert best is not None
        names.append(best.box)
        text.xyann = best.shift
        if best.has_line:
            lines.append(_line(best.box, marks[name]))
            ends = axes.transData.inverted().transform(lines[-1][[0, -1]])
            axes.plot(*ends.T, color="0.6", linewidth=0.8, zorder=0.5, scalex=False, scaley=False)


def _places(extent: Bbox, marks: Mapping[str, Pixels], name: str, pixels: float) -> Iterator[_Place]:
    """Give the places for a name, the nearest to its mark first, right and left of it before above and below."""
    angles = sorted(np.arange(NUM_DIRECTIONS) * 2 * np.pi / NUM_DIRECTIONS, key=lambda angle: abs(np.sin(angle)))
    half = np.array([extent.width, extent.height]) / 2
    own = marks[name]
    for distance in DISTANCES:
        for angle in angles:
            shift = np.array([np.cos(angle), np.sin(angle)]) * (distance * pixels + half)
            ends = own + shift - half - NAME_MARGIN * pixels, own + shift + half + NAME_MARGIN * pixels
            box = Bbox.from_extents(*ends[0], *ends[1])
            gaps = {other: float(np.linalg.norm(mark - _nearest(box, mark))) for other, mark in marks.items()}
            is_misread = any(gap < CLEARER * gaps[name] for other, gap in gaps.items() if other != name)
            yield _Place(tuple((shift / pixels).tolist()), box, distance >= LINE_FROM or is_misread)


def _gap_to_next(marks: Mapping[str, Pixels], name: str) -> float:
    gaps = [float(np.linalg.norm(mark - marks[name])) for other, mark in marks.items() if other != name]
    return min(gaps, default=0.0)


def _line(box: Bbox, mark: Pixels) -> Pixels:
    """Return points of the line from a mark to its name."""
    return np.linspace(mark, _nearest(box, mark), NUM_LINE_POINTS)


def _num_inside(box: Bbox, line: Pixels) -> int:
    return sum(bool(box.contains(x, y)) for x, y in line.tolist())


def _outside(box: Bbox, frame: Bbox) -> float:
    return float(box.width * box.height) - _overlap(box, frame)


def _nearest(box: Bbox, mark: Pixels) -> Pixels:
    return np.clip(mark, [box.x0, box.y0], [box.x1, box.y1])


def _overlap(first: Bbox, second: Bbox) -> float:
    shared = Bbox.intersection(first, second)
    return 0.0 if shared is None else float(shared.width * shared.height)
