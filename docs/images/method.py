"""Draw method.svg, the figure of docs/concepts.md: `python docs/images/method.py`."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

PLAIN, SCALED, WEIGHT = "#e8edf3", "#f7d9b0", "#cfe3d0"


def box(axes: Axes, x: float, y: float, text: str, color: str, width: float = 1.5, height: float = 0.62) -> None:
    """Draw a box with its text, centred at (x, y)."""
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle="round,pad=0.06", facecolor=color, edgecolor="#445"))
    axes.text(x, y, text, ha="center", va="center", fontsize=11)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw an arrow."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "#445", "shrinkA": 0, "shrinkB": 0})


def main() -> None:
    """Training with scales on the left, the merged model on the right."""
    matplotlib.rcParams |= {"svg.hashsalt": "seal", "svg.fonttype": "path"}
    figure = Figure(figsize=(11, 4.2))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 16), ylim=(-0.4, 5.4))
    axes.axis("off")
    for y, head, scale in ((4.0, "1", "1.3"), (2.8, "2", "0.7"), (1.1, "H", "1.1")):
        box(axes, 1.3, y, f"head {head}", PLAIN)
        box(axes, 4.1, y, f"× $s_{head}$ = {scale}", SCALED)
        arrow(axes, (2.15, y), (3.25, y))
        arrow(axes, (4.95, y), (6.2, y))
    axes.text(2.7, 1.95, "⋮", fontsize=16, ha="center", va="center")
    box(axes, 6.75, 2.55, "concat", PLAIN, 1.0, 3.9)
    box(axes, 8.7, 2.55, "$W_o$", WEIGHT, 1.0)
    arrow(axes, (7.35, 2.55), (8.1, 2.55))
    arrow(axes, (9.3, 2.55), (10.0, 2.55))
    axes.text(4.9, 5.0, "training: only the scales learn", ha="center", fontsize=12, weight="bold")
    axes.text(4.1, 0.25, "SEAL-H: one number per head\nSEAL-C: one per channel of it", ha="center", fontsize=10)
    axes.plot([10.55, 10.55], [0, 5.2], color="#99a", linestyle=":")
    for y, head in ((4.0, "1"), (2.8, "2"), (1.1, "H")):
        box(axes, 11.9, y, f"head {head}", PLAIN)
        arrow(axes, (12.75, y), (13.1, y))
    axes.text(11.9, 1.95, "⋮", fontsize=16, ha="center", va="center")
    box(axes, 13.6, 2.55, "concat", PLAIN, 0.9, 3.9)
    box(axes, 15.1, 2.55, "$W_o$ diag($s$)", WEIGHT, 1.3)
    arrow(axes, (14.12, 2.55), (14.36, 2.55))
    axes.text(13.4, 5.0, "serving: merged, a plain model", ha="center", fontsize=12, weight="bold")
    figure.savefig(Path(__file__).with_name("method.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
