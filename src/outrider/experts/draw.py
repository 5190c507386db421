"""Plans as a picture: load before and after, a heat map of ranks, what balance costs in bytes. Called by commands.py.

One figure, one file: png, svg or pdf. Equal input gives equal bytes (no date, no random ids, a fixed style). matplotlib
is loaded when it is first needed, through its objects: nothing of its global state is left changed.
"""

from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from outrider.errors import CallerError
from outrider.experts.front import Front, Point
from outrider.experts.picture import Loads, Picture
from outrider.experts.places import put_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = ("png", "svg", "pdf")
NO_DATE = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
HOME, PLANNED, RIVAL, LIMIT = "#D55E00", "#0072B2", "#6E6E6E", "#000000"  # Okabe and Ito: told apart by every eye
FAINT, QUIET, NOTHING = "#E4E4E4", "#555555", "#A8A8A8"
DOTTED = (0, (2, 2))
INCHES, DOTS_PER_INCH = (13.0, 9.2), 150
LEFT, RIGHT, BOTTOM, TOP = 0.06, 0.925, 0.105, 0.865
CELLS = 64  # up to so many ranks or micro-steps, lines part the cells of a heat map
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "svg.hashsalt": "outrider",
}


def ready(path: Path) -> None:
    """CallerError unless the file's ending is one that can be drawn and matplotlib is there: asked before planning."""
    if _kind(path) not in KINDS:
        raise CallerError(f"--plot {path}: ends in none of .png, .svg and .pdf. Name a file that does.")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise CallerError(f"--plot: {error.name} is not installed. Run: pip install 'outrider[plots]'") from error


def draw(path: Path, picture: Picture, front: Front) -> None:
    """Write the picture and the front of planners beside it."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):
        figure = Figure(figsize=INCHES, dpi=DOTS_PER_INCH)
        notes = picture.notes
        if front.missing:
            notes += f" Not possible here: {', '.join(name for name, _ in front.missing)}."
        for y, words, size, weight, colour in (
            (0.97, picture.title, 14, "bold", LIMIT),
            (0.943, picture.subtitle, 10.5, "normal", QUIET),
            (0.03, notes, 8.5, "normal", QUIET),
        ):
            figure.text(LEFT, y, words, fontsize=size, fontweight=weight, color=colour, va="center", parse_math=False)
        grid = figure.add_gridspec(2, 2, left=LEFT, right=RIGHT, bottom=BOTTOM, top=TOP, hspace=0.36, wspace=0.2)
        _lines(figure.add_subplot(grid[0, 0]), picture.loads)
        _front(figure, figure.add_subplot(grid[0, 1]), front, 100 * (float(picture.loads.limit.mean()) - 1))
        _heat(figure, (figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])), picture)
        drawn = BytesIO()  # an interrupted drawing leaves no half of a file
        figure.savefig(drawn, format=_kind(path), metadata=NO_DATE[_kind(path)])
    path.write_bytes(drawn.getvalue())


def _kind(path: Path) -> str:
    return path.suffix[1:].lower()


def _lines(axes: "Axes", over: Loads) -> None:
    """Largest load over the mean by micro-step: a line for the mean over layers, a band from the least to the most."""
    layers, steps, _ = over.home.shape
    at = np.arange(steps)
    mark = "o" if steps <= CELLS else None
    for words, ratio_LMR, colour in (("at home", over.home, HOME), ("planned", over.planned, PLANNED)):
        most_LM = np.nanmax(ratio_LMR, axis=2)
        if layers > 1:
            edges = most_LM.min(axis=0), most_LM.max(axis=0)
            axes.fill_between(at, *edges, color=colour, alpha=0.18, linewidth=0 if steps > 1 else 5)
        axes.plot(at, most_LM.mean(axis=0), color=colour, linewidth=2, marker=mark, markersize=4, label=words)
    ends = np.array([-0.5, *at, steps - 0.5])
    axes.plot(
        ends, np.pad(over.limit.mean(axis=0), 1, "edge"), color=LIMIT, linestyle=DOTTED, label="limit of whole tokens"
    )
    top = max(1.05, float(np.nanmax(over.home)), float(np.nanmax(over.planned)))
    axes.set_ylim(1 - 0.03 * (top - 1), 1 + 1.17 * (top - 1))
    axes.set_xlim(-0.5, steps - 0.5)
    _count_along(axes.xaxis, steps)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_xlabel("micro-step")
    axes.set_ylabel("largest / mean rank load")
    axes.legend(loc="upper center", ncols=3, frameon=False, borderaxespad=0.1, handlelength=1.6)
    spread = f"line: mean over {layers} layers; band: least to most" if layers > 1 else "one layer"
    _title(axes, "Load, at home and planned", f"{spread}; home: contiguous experts")


def _front(figure: "Figure", axes: "Axes", front: Front, limit: float) -> None:
    """Load above the mean [%] against bytes moved; both axes begin at 0 and go on by powers of ten."""
    marks = [(float(p.bytes_moved), 100 * (p.imbalance - 1), _named(p)) for p in front.points]
    _powers(axes, "x", [x for x, _, _ in marks], _bytes)
    _powers(axes, "y", [limit, *(y for _, y, _ in marks)], lambda value: f"{value:g} %")
    best = [(p.bytes_moved, 100 * (p.imbalance - 1)) for p in front.best()]
    axes.step(*np.array(best).T, where="post", color="#B5B5B5", zorder=1)
    axes.axhline(limit, color=LIMIT, linestyle=DOTTED, zorder=1)
    for point, (x, y, _) in zip(front.points, marks, strict=True):
        ours = point.planner == "foresight"
        shape, colour = ("o", PLANNED) if ours else ("s", RIVAL)
        axes.plot(x, y, shape, color=colour, markersize=7 if ours else 6, clip_on=False)
        if point.asked:
            axes.plot(x, y, "o", markersize=13, mfc="none", mec=HOME, mew=1.8, clip_on=False)
    axes.grid(color=FAINT, linewidth=0.7)
    axes.set_xlabel("bytes of copies moved in the step, modelled")
    axes.set_ylabel("largest rank load above the mean")
    _title(axes, "What balance costs", "mean over layers and micro-steps; circled: this plan; grey: the Pareto front")
    put_labels(figure, axes, marks, [*pairwise(best)], limit)


def _heat(figure: "Figure", pair: "tuple[Axes, Axes]", picture: Picture) -> None:
    """Ranks over micro-steps, before and after, on one colour scale: white is the mean."""
    from matplotlib.colors import CenteredNorm

    over = picture.loads
    layer = over.worst_layer() if picture.layer is None else picture.layer
    words = "the worst layer at home; " if layer == over.worst_layer() else ""
    both = over.home[layer], over.planned[layer]
    reach = max(0.2, *(float(np.nanmax(np.abs(ratio_MR - 1))) for ratio_MR in both))
    words += "grey: excluded; " if np.isnan(both).any() else ""
    for axes, ratio_MR, when in zip(pair, both, ("at home", "planned"), strict=True):
        scale = CenteredNorm(1.0, reach)
        image = axes.imshow(ratio_MR.T, aspect="auto", interpolation="nearest", cmap="RdBu_r", norm=scale)
        for axis, size in zip((axes.xaxis, axes.yaxis), ratio_MR.shape, strict=True):
            _count_along(axis, size)
            if max(ratio_MR.shape) <= CELLS:
                axis.set_ticks(np.arange(1, size) - 0.5, minor=True)
        axes.set_facecolor(NOTHING)
        axes.grid(which="minor", color=FAINT, linewidth=0.5)
        axes.tick_params(which="minor", length=0)
        axes.spines[["top", "right"]].set_visible(True)
        axes.set_xlabel("micro-step")
        axes.set_ylabel("rank")
        spread = f"{words}rank load / mean: {np.nanmin(ratio_MR):.3f} to {np.nanmax(ratio_MR):.3f}"
        _title(axes, f"Layer {layer} of {len(over.home)}, {when}", spread)
    place = pair[1].get_position()
    bar = figure.colorbar(image, cax=figure.add_axes((place.x1 + 0.012, place.y0, 0.012, place.height)))
    bar.ax.set_ylim(max(0.0, 1 - reach), 1 + reach)
    bar.set_label("rank load / mean")


def _count_along(axis: Any, size: int) -> None:
    """Ticks at whole numbers from 0."""
    if size <= 10:
        axis.set_ticks(range(size))
    else:
        axis.get_major_locator().set_params(integer=True)


def _title(axes: "Axes", bold: str, quiet: str) -> None:
    axes.set_title(bold, loc="left", fontsize=11.5, fontweight="bold", pad=22)
    axes.text(0, 1.025, quiet, transform=axes.transAxes, fontsize=9.5, color=QUIET, va="bottom")


def _powers(axes: "Axes", which: str, values: list[float], words: Any) -> None:
    """A scale from 0 to anything: straight to the power of ten under the least of the values, then logarithmic."""
    some = [value for value in values if value > 1e-4]
    first, most = np.floor(np.log10(min(some, default=1.0))), 1.6 * max(some, default=1.0)
    ticks = [0.0, *(10.0**power for power in np.arange(first, np.log10(most)))]
    every = -(-len(ticks) // 8)
    set_scale, set_limit = (axes.set_xscale, axes.set_xlim) if which == "x" else (axes.set_yscale, axes.set_ylim)
    set_scale("symlog", linthresh=10.0**first, linscale=0.6)
    set_limit(-0.25 * 10.0**first, most)
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks(ticks[::every], [words(value) for value in ticks[::every]])
    axis.set_tick_params(which="minor", length=0)


def _bytes(value: float) -> str:
    sizes = (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    return next((f"{value / size:g} {unit}" for unit, size in sizes if value >= size), f"{value:g}")


def _named(point: Point) -> str:
    if point.planner != "foresight":
        return point.planner
    goal = " (time)" if point.objective == "time" else ""
    return f"foresight{goal}, {point.slots} slot{'' if point.slots == 1 else 's'}"
