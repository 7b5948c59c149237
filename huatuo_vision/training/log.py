"""`log.jsonl`, a line for every log event of a run; and the same as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huatuo_vision.run_record import write_text


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries, without what a kill tore; none where there is no log yet."""
    entries = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


def rewrite_log(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(f"{json.dumps(entry)}\n" for entry in entries))


def plot_losses(log: Path, target: Path, title: str) -> None:
    """One panel per phase from `log.jsonl`; sources as thin lines where a phase mixes several."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    phases: dict[str, list[dict]] = {}
    for entry in read_log(log):
        phases.setdefault(entry["phase"], []).append(entry)
    if not phases:  # somebody removed the log
        return
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
