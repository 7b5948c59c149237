"""Train a recipe: `accelerate launch train.py --recipe recipes/phantom.yaml`.

The recipe is the interface; the command line only says which recipe, which phase and where. Running the
same command again continues where the last one stopped.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from huatuo_vision.cli import run_command
from huatuo_vision.launch import launched_world
from huatuo_vision.recipe import PHASE_NAMES, Recipe, load_recipe
from huatuo_vision.schema import UserError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="the recipe's YAML file")
    parser.add_argument("--phase", choices=PHASE_NAMES, help="only this phase (default: all, in the recipe's order)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key; repeatable"
    )
    parser.add_argument("--out", type=Path, help="run folder (default: runs/<recipe name>)")
    parser.add_argument("--fresh", action="store_true", help="start over; an earlier run in the folder is moved aside")
    parser.add_argument("--dry-run", action="store_true", help="resolve and count everything, train nothing")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    recipe = load_recipe(arguments.recipe, arguments.set)
    if arguments.phase is not None and arguments.phase not in recipe.phases:
        raise UserError(f"--phase {arguments.phase}: recipe {arguments.recipe} has {', '.join(recipe.phases)}")
    phases = [arguments.phase] if arguments.phase else list(recipe.phases)
    out = arguments.out or Path("runs") / recipe.name

    # Rows differ in length, and a GPU's memory would fill with gaps between them. Read when torch is imported, which
    # takes this name before the other.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # Imported here, so that --help and a mistake in the recipe answer at once.
    from huatuo_vision.training.console import main_console

    console = main_console()
    if arguments.dry_run:
        from huatuo_vision.training.dry_run import dry_run

        dry_run(recipe, phases, console)
        return

    from huatuo_vision.training.run import train
    from huatuo_vision.training.stop import StopRequest

    final = train(recipe, out, phases=phases, fresh=arguments.fresh, overrides=arguments.set, console=console)
    if recipe.hub.push != "never" and launched_world().rank == 0:
        with StopRequest():
            push(recipe, out, phases, final, console)


def push(recipe: Recipe, out: Path, phases: list[str], final: Path | None, console: Console) -> None:
    """Push what is finished: each phase to a revision of its name where the recipe says so, the last one to main.
    A push that fails is reported with the command that tries again; the run is on disk and stays there."""
    from huatuo_vision.hub import try_push
    from huatuo_vision.training.run import plain_checkpoint

    folders = {name: out / name / "model" for name in phases} if recipe.hub.push == "phases" else {}
    if final is not None:
        folders["main"] = final
    for revision, folder in folders.items():
        pushed = try_push(
            plain_checkpoint(folder),  # an adapter would name a folder of this machine as its base
            recipe.hub.repo_id,
            revision=revision,
            private=recipe.hub.private,
            license=recipe.hub.license,
        )
        if pushed.ok:
            said = escape(f"pushed       {folder} to {recipe.hub.repo_id}@{revision}: {pushed.url}")
        else:
            said = f"[red]not pushed[/red]: {escape(pushed.error)}\n  try again: {escape(pushed.redo_command)}"
        console.print(said, highlight=False, soft_wrap=True)  # a command is one line


if __name__ == "__main__":
    run_command(main)
