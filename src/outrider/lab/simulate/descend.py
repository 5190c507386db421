"""Downhill without slopes: Nelder and Mead's simplex (1965). Pure; for sums of squares that scheduling makes jump."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


def descend(
    height: Callable[[Vector], float], start: Vector, size: float, calls: int, gain: float
) -> tuple[float, Vector]:
    """The lowest height found from `start`, and where.

    size   of the first simplex, along each axis
    calls  of `height` at most, give or take a shrink; it ends earlier when the simplex is level within the share `gain`
    """
    points = [start, *(start + size * axis for axis in np.eye(len(start)))]
    heights = [height(point) for point in points]
    left = calls - len(points)
    while left > 0:
        order = np.argsort(heights, kind="stable")
        points, heights = [points[i] for i in order], [heights[i] for i in order]
        if heights[-1] - heights[0] < gain * abs(heights[0]):
            break
        middle = np.mean(points[:-1], axis=0)
        way = middle - points[-1]
        there, left = middle + way, left - 1
        level = height(there)
        if level < heights[0]:
            beyond, left = middle + 2 * way, left - 1
            further = height(beyond)
            points[-1], heights[-1] = (beyond, further) if further < level else (there, level)
        elif level < heights[-2]:
            points[-1], heights[-1] = there, level
        else:
            near, left = middle + (0.5 if level < heights[-1] else -0.5) * way, left - 1
            nearer = height(near)
            if nearer < min(level, heights[-1]):
                points[-1], heights[-1] = near, nearer
            else:
                points = [points[0], *((point + points[0]) / 2 for point in points[1:])]
                heights = [heights[0], *(height(point) for point in points[1:])]
                left -= len(points) - 1
    lowest = int(np.argmin(heights))
    return heights[lowest], points[lowest]
