"""The loss curves of a run as a picture."""

from __future__ import annotations

import json
from pathlib import Path


def plot_losses(log: Path, target: Path, title: str) -> None:
    """One panel per phase from `log.jsonl`; sources as thin lines where a phase mixes several."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    phases: dict[str, list[dict]] = {}
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        phases.setdefault(entry["phase"], []).append(entry)
    figure, axes = pyplot.subplots(
        1, len(phases), figsize=(5.2 * len(phases), 3.6), squeeze=False, layout="constrained"
    )
    for axis, (phase, entries) in zip(axes[0], phases.items(), strict=True):
        steps = [entry["step"] for entry in entries]
        sources = sorted({key for entry in entries for key in entry if key.startswith("loss/")})
        for source in sources:
            axis.plot(steps, [entry.get(source) for entry in entries], linewidth=0.9, alpha=0.7, label=source[5:])
        axis.plot(steps, [entry["loss"] for entry in entries], color="black", linewidth=1.5, label="all")
        axis.set_title(phase, loc="left")
        axis.set_xlabel("optimizer step")
        axis.set_ylabel("loss per supervised token")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if sources:
            axis.legend(frameon=False)
    figure.suptitle(title, x=0.01, horizontalalignment="left", fontsize="medium")
    temporary = target.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=130)
    pyplot.close(figure)
    temporary.replace(target)
