# SPDX-License-Identifier: BSD-3-Clause
"""Heat maps of a calibration: thresholds, densities and errors, layers downwards and heads to the right."""

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from sale_flex.calibration.artefact import Calibration


def draw(calibration: Calibration) -> Figure:
    """Three maps side by side; dense heads are blank in the first, whose colours are logarithmic.

    Args:
        calibration: What to draw.
    """
    rows, heads = calibration.thresholds.shape
    figure = Figure(figsize=(3 + 3 * max(1.0, heads / 10), 1.8 + max(1.0, 0.22 * rows)), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    goal = calibration.goal
    thresholds = torch.where(calibration.thresholds > 0, calibration.thresholds, torch.nan)
    largest = max(calibration.errors.max().item(), goal.target)
    panels = (
        ("threshold", thresholds, LogNorm(2.0**-14, 1.0)),
        ("density", calibration.densities, Normalize(0.0, 1.0)),
        (f"{goal.error} error", calibration.errors, Normalize(0.0, largest)),
    )
    for axis, (title, tensor, norm) in zip(figure.subplots(1, 3, squeeze=False)[0], panels):
        image = axis.imshow(tensor.tolist(), norm=norm, aspect="auto", interpolation="nearest", cmap="viridis")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("head", fontsize=8)
        axis.set_xticks(range(heads) if heads <= 16 else range(0, heads, 8))
        axis.set_yticks(range(rows), [str(layer) for layer in calibration.layers])
        axis.tick_params(labelsize=7)
        figure.colorbar(image, ax=axis).ax.tick_params(labelsize=7)
    figure.axes[0].set_ylabel("layer", fontsize=8)
    figure.suptitle(
        f"{calibration.model}\n{goal.error} error at most {goal.target:g}: density {calibration.on.density:.3f}, "
        f"rise in loss {calibration.on.rise:+.4f}",
        fontsize=9,
    )
    return figure
