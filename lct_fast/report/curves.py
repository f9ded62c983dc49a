"""Learning curves as a PNG."""

import warnings
from pathlib import Path

from lct_fast.report.run import Curve, exit_name, read_run


def plot_curves(run: Path, out: Path) -> Path:
    """Draw accuracy and loss per exit of the run folder ``run`` into the PNG file ``out``; returns ``out``.

    Needs no display. Raises ValueError where ``run`` is no run folder.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    record = read_run(run)
    loss = record.loss_curves()
    panels: list[tuple[str, str, list[Curve]]] = [
        ("test accuracy", "epoch", record.accuracy_curves()),
        (loss.name, loss.unit, loss.curves),
    ]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    # A name is text: "$" in it starts no formula.
    figure.suptitle(record.name, parse_math=False)
    for axes, (name, unit, curves) in zip(figure.subplots(1, 2), panels, strict=True):
        for k, curve in enumerate(curves, start=1):
            ys = [float("nan") if y is None else y for _, y in curve]
            axes.plot([x for x, _ in curve], ys, marker=".", label=exit_name(k, len(curves)))
        axes.set_xlabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        if curves:
            axes.legend()
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes, which is no reason to fail.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(out, format="png", dpi=120)
    return out
