"""Which parts a set has, which of them are finished, and which phases are trained once for several rows."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from huatuo_vision.ablate.set_file import LoadedSet, Row
from huatuo_vision.evaluation import statistics
from huatuo_vision.evaluation.benchmarks import BENCHMARKS
from huatuo_vision.evaluation.compare import SCORES_FILE
from huatuo_vision.recipe import Recipe, differing_keys, load_recipe
from huatuo_vision.run_record import read_record
from huatuo_vision.schema import UserError

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Run:
    """One row trained with one seed."""

    row: Row
    seed: int
    recipe: Recipe  # with the seed, and what the command line overrides
    folder: Path
    donor: Run | None  # an earlier run that shares its first phases
    shared: tuple[str, ...]  # those phases

    @property
    def name(self) -> str:
        return self.folder.name

    def is_finished(self, phase: str) -> bool:
        record = read_record(self.folder / phase / "model")
        return record is not None and record["phases"][phase]["fingerprint"] == self.recipe.fingerprint(phase)

    @property
    def is_trained(self) -> bool:
        return self.is_finished(list(self.recipe.phases)[-1]) and (self.folder / "final").exists()


@dataclass(frozen=True, slots=True)
class Part:
    """One command: a training or an evaluation. Killed and started again, it goes on where it was."""

    name: str  # names its log and its Slurm script
    kind: str  # train or evaluate
    command: tuple[str, ...]  # the arguments of accelerate launch, from the script on
    after: tuple[str, ...]  # the parts that must be finished first
    finished: bool


@dataclass(frozen=True, slots=True)
class Plan:
    loaded: LoadedSet
    out: Path  # the table's folder
    runs: tuple[Run, ...]
    parts: tuple[Part, ...]

    @property
    def open(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if not part.finished)

    @property
    def phases(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(phase for run in self.runs for phase in run.recipe.phases))

    def runs_of(self, row: Row) -> list[Run]:
        return [run for run in self.runs if run.row is row]


def make_plan(loaded: LoadedSet, folder: Path, overrides: Sequence[str]) -> Plan:
    """The parts of a set whose run folders lie in `folder`, which other sets may share. Reads, and starts nothing.

    Raises UserError where a run folder holds another recipe's run.
    """
    runs: list[Run] = []
    for seed in loaded.spec.seeds:
        for row in loaded.rows:
            recipe = load_recipe(row.path, [*overrides, f"seed={seed}"])
            donor, shared = _donor(recipe, runs)
            run = Run(row, seed, recipe, folder / f"{recipe.name}-seed{seed}", donor, shared)
            _refuse_another_recipe(run)
            runs.append(run)
    parts = [part for run in runs for part in _parts(run, loaded, overrides)]
    return Plan(loaded, folder / loaded.spec.name, tuple(runs), tuple(parts))


def _donor(recipe: Recipe, runs: Sequence[Run]) -> tuple[Run | None, tuple[str, ...]]:
    """The run that trains the most of the recipe's phases just as the recipe would."""
    best: tuple[Run | None, tuple[str, ...]] = None, ()
    for run in runs:
        shared = []
        for phase in recipe.phases:
            if phase not in run.recipe.phases or run.recipe.fingerprint(phase) != recipe.fingerprint(phase):
                break
            shared.append(phase)
        if len(shared) > len(best[1]):
            best = run, tuple(shared)
    return best


def _refuse_another_recipe(run: Run) -> None:
    for phase in run.recipe.phases:
        begun = run.folder / phase / "recipe.yaml"
        if begun.exists() and (changed := differing_keys(load_recipe(begun), run.recipe, through_phase=phase)):
            raise UserError(
                f"{run.folder} holds phase {phase} of another recipe than {run.row.path}: {', '.join(changed)} differ; "
                "move that folder away, or choose another --out"
            )


def evaluation_folder(run: Run, loaded: LoadedSet, blind: bool) -> Path:
    """Sets that ask the same of a run share the answers; others have a folder of their own."""
    spec = loaded.spec
    asked = json.dumps([sorted(spec.benchmarks), spec.protocol])
    digest = hashlib.sha256(asked.encode()).hexdigest()[:8]
    return run.folder / "eval" / f"{'blind' if blind else 'sighted'}-{digest}"


def is_asked_blind(row: Row, loaded: LoadedSet) -> bool:
    return loaded.spec.blind == "all" or (loaded.spec.blind == "base" and row is loaded.base)


def _parts(run: Run, loaded: LoadedSet, overrides: Sequence[str]) -> list[Part]:
    train = ["train.py", "--recipe", _shown(run.row.path), "--out", _shown(run.folder)]
    own = [f"seed={run.seed}"]
    if run.recipe.hub.push != "never":
        own.append("hub.push=never")  # its seeds would overwrite each other there
    for override in (*overrides, *own):
        train += ["--set", override]
    after: tuple[str, ...] = ()
    if run.donor is not None and not all(run.is_finished(phase) for phase in run.shared):
        train += ["--set", f"reuse={_shown(run.donor.folder)}"]
        after = (f"train-{run.donor.name}",)
    trained = run.is_trained
    parts = [Part(f"train-{run.name}", "train", tuple(train), after, trained)]
    for blind in (False, True) if is_asked_blind(run.row, loaded) else (False,):
        folder = evaluation_folder(run, loaded, blind)
        evaluate = ["eval.py", "--model", _shown(run.folder / "final"), "--benchmarks", *loaded.spec.benchmarks]
        evaluate += ["--out", _shown(folder), "--protocol", loaded.spec.protocol]
        if loaded.spec.batch_size is not None:
            evaluate += ["--batch-size", str(loaded.spec.batch_size)]
        if blind:
            evaluate.append("--blind")
        name = f"evaluate-{run.name}" + ("-blind" if blind else "")
        finished = trained and _is_scored(folder, run)
        parts.append(Part(name, "evaluate", tuple(evaluate), (parts[0].name,), finished))
    return parts


def _is_scored(folder: Path, run: Run) -> bool:
    """Whether the folder has scores, of this training and not of one before it."""
    scores, record = folder / SCORES_FILE, run.folder / list(run.recipe.phases)[-1] / "model" / "run.json"
    return scores.exists() and scores.stat().st_mtime >= record.stat().st_mtime


def _shown(path: Path) -> str:
    """As a user would type it: relative to where the command runs, where that is shorter."""
    relative = os.path.relpath(path)
    return relative if not relative.startswith(os.path.join("..", "..", "..")) else str(path.absolute())


def script(name: str) -> str:
    """train.py or eval.py, from wherever the command runs."""
    return _shown(REPOSITORY / name)


def launcher(loaded: LoadedSet, part: Part) -> list[str]:
    """`accelerate launch` with the set's arguments for this part."""
    launch = loaded.spec.launch
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    config = launch.evaluate_config or launch.config if part.kind == "evaluate" else launch.config
    if config is not None:
        command += ["--config_file", _shown(loaded.path.parent / config)]
    return [*command, *launch.arguments]


def show_plan(plan: Plan, console: Console) -> None:
    """What is finished, what will be trained, what is shared, and how small a difference the set can find."""
    spec, loaded = plan.loaded.spec, plan.loaded
    table = Table(title=Text(f"{spec.name}: {spec.title}"), title_justify="left")
    for column in ("row", "seed", *plan.phases, "sighted", "blind"):
        table.add_column(column)
    open_parts = {part.name for part in plan.open}
    for run in plan.runs:
        cells = [_phase_cell(run, phase) for phase in plan.phases]
        for suffix, asked in (("", True), ("-blind", is_asked_blind(run.row, loaded))):
            finished = f"evaluate-{run.name}{suffix}" not in open_parts
            cells.append("" if not asked else "finished" if finished else "to do")
        table.add_row(Text(run.row.label), str(run.seed), *cells)
    console.print(table)
    trained = sum(not run.is_finished(p) and p not in run.shared for run in plan.runs for p in run.recipe.phases)
    evaluations = sum(part.kind == "evaluate" for part in plan.open)
    shared = sum(len(run.shared) for run in plan.runs)
    console.print(
        f"{trained} phases to train, {shared} taken over from another row, {evaluations} evaluations; "
        f"{len(plan.parts) - len(plan.open)} of {len(plan.parts)} parts are finished.",
        highlight=False,
    )
    console.print(_smallest_differences(loaded))


def _smallest_differences(loaded: LoadedSet) -> Table:
    table = Table("benchmark", title="What the questions can show", title_justify="left")
    table.add_column("questions", justify="right")
    table.add_column("detectable", justify="right")
    table.caption = "points that one seed shows four times out of five, if 20 % of the answers differ"
    for name in loaded.benchmarks:
        n = BENCHMARKS[name].expected_n
        smallest = statistics.smallest_detectable_difference(n or 0)
        table.add_row(name, "–" if n is None else f"{n:,}", "–" if smallest is None else f"{100 * smallest:.1f}")
    return table


def _phase_cell(run: Run, phase: str) -> str:
    if phase not in run.recipe.phases:
        return "–"
    if run.is_finished(phase):
        return "finished"
    return f"as {run.donor.row.label}" if run.donor is not None and phase in run.shared else "to do"
