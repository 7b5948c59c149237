"""A set file: one YAML file that says which recipes are compared, on what, and how their parts are launched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, ValidationError, model_validator

from huatuo_vision.evaluation.benchmarks import chosen_benchmarks
from huatuo_vision.evaluation.protocols import PROTOCOLS
from huatuo_vision.recipe import NAME, Recipe, Strict, first_sentence, load_recipe, read_yaml, refuse
from huatuo_vision.schema import UserError


class RowSpec(Strict):
    """A row of the table: a recipe, and the paper's numbers where its `reproduces` does not say them."""

    recipe: str = Field(description="the recipe's file, relative to the set file")
    paper: dict[str, float] | None = Field(
        None, description="benchmark -> the paper's accuracy in percent (default: the recipe's reproduces.targets)"
    )


def _row(value: Any) -> Any:
    return {"recipe": value} if isinstance(value, str) else value


class LaunchSpec(Strict):
    """How `accelerate launch` starts train.py and eval.py."""

    config: str | None = Field(None, description="a file of recipes/accelerate, relative to the set file")
    evaluate_config: str | None = Field(None, description="another such file for eval.py (default: config)")
    arguments: tuple[str, ...] = Field((), description="more arguments of accelerate launch")
    environment: dict[str, str] = Field({}, description="environment variables of every part")
    jobs: PositiveInt = Field(1, description="parts that run at the same time on this machine")


class SlurmSpec(Strict):
    """Lines of the Slurm scripts (`--slurm`)."""

    train: tuple[str, ...] = Field((), description="#SBATCH options of a training part, such as --gres=gpu:8")
    evaluate: tuple[str, ...] = Field((), description="#SBATCH options of an evaluation part")
    report: tuple[str, ...] = Field((), description="#SBATCH options of the last part, which writes the table")
    setup: tuple[str, ...] = Field((), description="shell lines before the command, such as module load")


class AblationSet(Strict):
    name: str = Field(pattern=NAME)
    title: str
    note: str | None = Field(None, description="one sentence that stands under every table, such as what it can't show")
    base: str = Field(description="the row that all others are compared with")
    rows: dict[str, Annotated[RowSpec, BeforeValidator(_row)]] = Field(min_length=2)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1)
    benchmarks: tuple[str, ...] = Field(min_length=1, description="NAME or NAME=PATH, as eval.py takes them")
    blind: Literal["none", "base", "all"] = Field("none", description="which rows are also asked without the pictures")
    protocol: str = "default"
    batch_size: PositiveInt | None = Field(None, description="rows at once in eval.py")
    launch: LaunchSpec = LaunchSpec()
    slurm: SlurmSpec = SlurmSpec()

    @model_validator(mode="after")
    def _check(self) -> AblationSet:
        if self.base not in self.rows:
            raise refuse(f"base {self.base!r} is no row; rows has: {', '.join(self.rows)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise refuse("a seed stands twice in seeds; the same training twice shows no spread")
        if self.protocol not in PROTOCOLS:
            raise refuse(f"protocol {self.protocol!r}: no such protocol; expected one of {', '.join(PROTOCOLS)}")
        return self


@dataclass(frozen=True, slots=True)
class Row:
    """A row with its recipe read."""

    label: str
    path: Path
    recipe: Recipe
    paper: dict[str, float]


@dataclass(frozen=True, slots=True)
class LoadedSet:
    path: Path
    spec: AblationSet
    rows: tuple[Row, ...]  # the base first
    benchmarks: tuple[str, ...]  # sets of eval.py as their members

    @property
    def base(self) -> Row:
        return self.rows[0]


def load_set(path: Path) -> LoadedSet:
    """The set in a YAML file and its rows' recipes. Raises UserError in one sentence for what either gets wrong."""
    values = read_yaml(path, kind="set", keys="name, title, base, rows, benchmarks")
    try:
        spec = AblationSet.model_validate(values)
    except ValidationError as error:
        raise UserError(f"set {path}: {first_sentence(error)}") from None
    for key in ("config", "evaluate_config"):
        config = getattr(spec.launch, key)
        if config is not None and not (path.parent / config).is_file():
            raise UserError(f"set {path}: launch.{key} {config} does not exist beside it")
    labels = [spec.base, *(label for label in spec.rows if label != spec.base)]
    rows = tuple(_load_row(label, spec.rows[label], path) for label in labels)
    files: dict[str, Path] = {}
    for row in rows:
        if (other := files.setdefault(row.recipe.name, row.path)) is not row.path:
            raise UserError(
                f"set {path}: {other} and {row.path} both have the name {row.recipe.name!r}, which names the run "
                "folder; give each recipe a name of its own"
            )
    return LoadedSet(path, spec, rows, tuple(chosen_benchmarks(spec.benchmarks)))


def _load_row(label: str, spec: RowSpec, set_path: Path) -> Row:
    path = set_path.parent / spec.recipe
    recipe = load_recipe(path)
    paper = spec.paper if spec.paper is not None else recipe.reproduces.targets if recipe.reproduces else {}
    return Row(label, path, recipe, dict(paper))
