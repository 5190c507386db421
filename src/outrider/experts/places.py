"""Where labels go on a scatter of points, so that none covers another, a point or a line. Called by draw.py."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Mark = tuple[float, float, str]
Spot = tuple[float, float]
MARK, LINE = 9.0, 2.0  # points that a mark and a line are wide
NEAR = ((9.0, 0.0, "left"), (-9.0, 0.0, "right"), (0.0, 12.0, "center"), (0.0, -12.0, "center"))
RADII = (14, 22, 32, 44, 58, 74)
ANGLES = (1, 15, 7, 9, 3, 13, 5, 11)  # in sixteenths of a turn


def put_labels(figure: "Figure", axes: "Axes", marks: list[Mark], front: list[tuple[Spot, Spot]], limit: float) -> None:
    """A label beside each mark in the nearest free place, with a thin line to it where that is far.

    marks  x, y in data, and words; front: stretches of a step line that goes across, then down; limit: y of a line
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    to_pixels, size = axes.transData.transform, figure.dpi / 72
    inside = axes.get_window_extent(renderer)

    def box(one: Spot, other: Spot, wide: float) -> Bbox:
        """Around a line from one to the other, in pixels; wide: points."""
        (x0, y0), (x1, y1) = to_pixels((one, other)).tolist()
        return Bbox.from_extents(min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)).padded(wide * size / 2)

    taken = [box((x, y), (x, y), MARK) for x, y, _ in marks]
    low, high = axes.get_xlim()
    taken.append(box((low, limit), (high, limit), LINE))
    for (x, y), (far_x, far_y) in front:
        taken += [box((x, y), (far_x, y), LINE), box((far_x, y), (far_x, far_y), LINE)]
    for x, y, words in sorted(marks, key=lambda mark: (mark[1], -mark[0])):
        for dx, dy, align in _places():
            text = axes.annotate(
                words, (x, y), (dx, dy), textcoords="offset points", ha=align, va="center", fontsize=9.5
            )
            extent = text.get_window_extent(renderer).padded(2 * size, 0)
            shown = (
                inside.x0 <= extent.x0 and extent.x1 <= inside.x1 and inside.y0 <= extent.y0 <= extent.y1 <= inside.y1
            )
            if shown and not any(extent.overlaps(other) for other in taken):
                break
            text.remove()
        else:
            continue  # no room within reach: the mark stays without words, the file with the figures names it
        taken.append(extent)
        if np.hypot(dx, dy) > NEAR[2][1]:
            axes.annotate(
                "",
                (x, y),
                (dx, dy),
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": "#9A9A9A", "linewidth": 0.8},
            )


def _places() -> list[tuple[float, float, str]]:
    """Offsets in points and how words are aligned there: the nearest first."""
    turns = [(radius, np.pi / 8 * angle) for radius in RADII for angle in ANGLES]
    around = [(float(radius * np.cos(turn)), float(radius * np.sin(turn))) for radius, turn in turns]
    return [*NEAR, *((dx, dy, "left" if dx > 0 else "right") for dx, dy in around)]
