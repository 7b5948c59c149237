"""The data card: README.md, its pictures and build.json beside the data set, all from what the run wrote down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from huggingface_hub import DatasetCard, DatasetCardData
from markupsafe import Markup

from data import balance, retrieve
from data.assemble import KINDS, rows_by_class
from data.config import BuildConfig
from data.dedup.stage import contamination
from data.funnel import StageCounts, draw_funnel, funnel
from data.mllm.cache import AnswerCache, Usage, spent
from data.mllm.prompts import GROUNDED
from data.reformat import answers_folder
from data.tables import RunFolder, write_json
from huatuo_vision.hub import render_markdown

TEMPLATE = Path(__file__).with_name("dataset_card.md.jinja")
_COUNTED = ("modality", "body_part", "licence", "method", "model", "prompt_version", "source", "collection")
# Settings that say nothing to a reader of the card: where the source lay, and tables of their own.
_UNTOLD = ("columns.", "shard_size", "validation.at_thresholds")
# Licences that the Hub has a name for, where all rows have the same.
_HUB_LICENCES = {"CC0-1.0": "cc0-1.0", "CC-BY-4.0": "cc-by-4.0", "CC-BY-SA-4.0": "cc-by-sa-4.0"}
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))


def write_card(run: RunFolder, config: BuildConfig) -> Path:
    """Write the card of a finished data set; returns its path."""
    out = run.out
    rows = rows_by_class(out)
    totals = {kind: sum(kinds.get(kind, 0) for kinds in rows.values()) for kind in KINDS}
    counted = _count(out)
    stages = funnel(run)
    state = run.state("assemble")
    usage = _usage(run) if config.reformat.method != "native_caption" else None
    draw_funnel(stages, out / "funnel.png")
    _draw_labels(counted, out / "labels.png")
    balanced = balance.report(run) if config.ingest.sources else None
    if balanced is not None:
        _draw_balance(balanced["modality"], out / "balance.png")
    configs = [
        {
            "config_name": f"{kind}-{where}",
            "data_files": [{"split": "train", "path": f"{where}/{kind}/train-*.parquet"}],
            "rows": number,
            "licences": ", ".join(sorted(_count(out / where, "*.parquet", ("licence",))["licence"])),
        }
        for where, kinds in rows.items()
        for kind, number in kinds.items()
    ]
    licences = counted["licence"]
    text = render_markdown(
        TEMPLATE,
        front_matter=Markup(_front_matter(config, configs, licences, totals)),
        name=config.name,
        notice=config.notice,
        rows=totals,
        configs=configs,
        funnel=stages,
        settings=list(_settings(run, stages)),
        made=counted["method", "model", "prompt_version"].most_common(),
        usage=usage and (usage[False] + usage[True]),
        cost=_cost(config, usage),
        modalities=counted["modality"].most_common(),
        body_parts=counted["body_part"].most_common(),
        licences=licences.most_common(),
        contamination=contamination(run),
        sources=config.ingest.sources,
        collections=counted["collection"],
        balance=balanced,
        published=balance.PUBLISHED,
        evidence=_evidence(run, out) if config.retrieve is not None else None,
        guideline_counts=retrieve.report(run) if config.retrieve is not None else None,
        counted=_listed,
        pmc=any("PMC" in article for article in _first_articles(out)),
        fingerprint=state["fingerprint"],
    )
    write_json(
        out / "build.json",
        {
            "schema": 1,
            "name": config.name,
            "fingerprint": state["fingerprint"],
            "rows": rows,
            "config": config.model_dump(mode="json", exclude={"ingest": {"storage_options"}, "executor": True}),
            "funnel": {stage.stage: {"in": stage.counts.rows_in, "out": stage.counts.rows_out} for stage in stages},
        },
    )
    path = out / "README.md"
    DatasetCard(text + "\n").save(path)
    return path


def _front_matter(
    config: BuildConfig, configs: Sequence[Mapping[str, Any]], licences: Counter[str], totals: Mapping[str, int]
) -> str:
    same = _HUB_LICENCES.get(next(iter(licences))) if len(licences) == 1 else None
    n = sum(totals.values())
    return DatasetCardData(
        license=same or "other",
        **({} if same else {"license_name": "per-row", "license_link": "README.md"}),
        task_categories=["image-text-to-text", "visual-question-answering"],
        language=["en"],
        size_categories=[next((name for limit, name in _SIZES if n < limit), "10M<n<100M")],
        source_datasets=["original"],
        pretty_name=config.name,
        configs=[{key: entry[key] for key in ("config_name", "data_files")} for entry in configs],
        tags=[
            "medical",
            "pubmedvision",
            *(["semihvision-style"] if config.ingest.sources else []),
            *([] if config.reformat.method == "native_caption" else ["synthetic"]),
        ],
    ).to_yaml()


def _count(folder: Path, pattern: str = "*/alignment/*.parquet", columns: Sequence[str] = _COUNTED) -> dict:
    """Column -> value -> alignment rows, and the same for the three that say how a text was made, together."""
    counts: dict[Any, Counter] = {name: Counter() for name in columns}
    together = ("method", "model", "prompt_version")
    counts[together] = Counter()
    paths = folder.glob(pattern) if "/" in pattern else folder.rglob(pattern)
    for path in sorted(paths):
        for batch in pq.ParquetFile(path).iter_batches(batch_size=10_000, columns=list(columns)):
            values = batch.to_pydict()
            for name in columns:
                counts[name].update(values[name])
            if set(together) <= set(columns):
                counts[together].update(zip(*(values[name] for name in together), strict=True))
    return counts


def _first_articles(out: Path) -> Iterator[str]:
    for path in sorted(out.glob("*/alignment/*.parquet")):
        yield from pq.ParquetFile(path).read(columns=["article"])["article"].slice(0, 10).to_pylist()


def _settings(run: RunFolder, stages: Sequence[StageCounts]) -> Iterator[tuple[str, str, Any]]:
    """What each stage's result depends on, as its pass recorded it; local paths and empty values are left out."""
    for stage in (stage.stage for stage in stages):
        for name, value in _flat(run.state(stage)["settings"]):
            local = name == "address" and "://" not in value
            told = not local and not name.startswith(_UNTOLD) and value not in (None, "")
            if told:
                yield stage, name, value


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, ", ".join(map(str, value)) if isinstance(value, list) else value


def _usage(run: RunFolder) -> dict[bool, Usage]:
    with AnswerCache(answers_folder(run)) as cache:
        return cache.usage()


def _cost(config: BuildConfig, usage: dict[bool, Usage] | None) -> str | None:
    prices = config.reformat.prices
    return None if prices is None or usage is None else f"{spent(usage, prices):,.2f} {prices.currency}"


def _evidence(run: RunFolder, out: Path) -> dict[str, Any]:
    """What was found, and how many rows were written with how much of it."""
    pieces: Counter[int] = Counter()
    for path in sorted(out.glob("*/alignment/*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(batch_size=10_000, columns=["method", "evidence"]):
            rows = zip(*batch.to_pydict().values(), strict=True)
            pieces.update(len(evidence) for method, evidence in rows if method == GROUNDED)
    return {"found": retrieve.scores(run), "pieces": sorted(pieces.items())}


def _listed(counts: Mapping[str, Any]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1] if isinstance(item[1], int) else 0, item[0]))
    return ", ".join(f"{name} {number}" for name, number in ordered) or "none"


def _draw_balance(counts: Mapping[str, Mapping[str, int]], path: Path) -> None:
    """Shares of modalities before and after: the paper's Figure 2, and this data set's. PNG."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["text.parse_math"] = False  # of others' names with dollars in them
    from matplotlib import pyplot

    labels = sorted(counts["before"], key=lambda label: -counts["before"][label])
    ours = [
        (label, *(100 * of.get(label, 0) / max(sum(of.values()), 1) for of in (counts["before"], counts["after"])))
        for label in labels
    ]
    paper = [(name, before, after) for name, before, after, _ in balance.PUBLISHED]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 0.45 * max(len(ours), len(paper)) + 1.4), layout="constrained")
    for side, (title, rows) in zip(axes, (("paper, Figure 2", paper), ("this data set", ours)), strict=True):
        for place, (shift, colour, word) in enumerate(((-0.2, "#b8c4d0", "before"), (0.2, "#2a6ca8", "after"))):
            drawn = [(n + shift, row[1 + place]) for n, row in enumerate(rows) if row[1 + place] is not None]
            side.barh(*zip(*drawn, strict=True), color=colour, height=0.38, label=word)
            for at, share in drawn:
                side.text(share, at, f" {share:.1f}", va="center", fontsize=8)
        side.set_yticks(range(len(rows)), [row[0] for row in rows])
        side.invert_yaxis()
        side.set_xlim(0, max(share or 0 for row in rows for share in row[1:]) * 1.15 or 1)
        side.set_xlabel("% of images" if rows is paper else "% of rows")
        side.set_title(title, loc="left", fontsize=11)
        side.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False, fontsize=9, loc="lower right")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_labels(counted: Mapping[str, Counter], path: Path) -> None:
    """Two bar charts: modalities and body parts, by their share of the alignment rows. PNG."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["text.parse_math"] = False  # of others' names with dollars in them
    from matplotlib import pyplot

    sides = (("modality", counted["modality"]), ("body part", counted["body_part"]))
    height = 0.34 * max(len(counts) for _, counts in sides) + 1.2
    figure, axes = pyplot.subplots(1, 2, figsize=(11, height), layout="constrained")
    for side, (title, counts) in zip(axes, sides, strict=True):
        labels = [(label or "unknown", number) for label, number in counts.most_common()]
        total = sum(counts.values())
        side.barh(range(len(labels)), [100 * number / total for _, number in labels], color="#2a6ca8", height=0.7)
        side.set_yticks(range(len(labels)), [label for label, _ in labels])
        for place, (_, number) in enumerate(labels):
            side.text(100 * number / total, place, f" {number:,}", va="center", fontsize=9)
        side.invert_yaxis()
        side.set_xlim(0, max(100 * number / total for _, number in labels) * 1.18)
        side.set_xlabel("% of alignment rows")
        side.set_title(title, loc="left", fontsize=11)
        side.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
