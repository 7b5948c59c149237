"""A checkpoint of a run in progress as a model folder, whole, whether it was written sharded (FSDP2, DeepSpeed) or not:

    python -m huatuo_vision.training.export --checkpoint runs/X/instruct/checkpoint-500 --out models/X-500

One process on a CPU; the weights need room in memory once, DeepSpeed's once more in fp32. The run goes on undisturbed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from huatuo_vision.cli import run_command
from huatuo_vision.schema import UserError

if TYPE_CHECKING:
    from torch import Tensor

SHARDED_WEIGHTS = "pytorch_model_fsdp_0"  # as accelerate names them


def export_checkpoint(checkpoint: Path, out: Path) -> None:
    """Write the model folder `out` (an adapter's where the phase trains one) from a checkpoint of a run folder.

    Raises UserError for what is no whole checkpoint in a run, one of DeepSpeed's without DeepSpeed, and a folder that
    exists.
    """
    import torch

    from huatuo_vision.model.folder import replacing
    from huatuo_vision.recipe import PHASE_NAMES, load_recipe
    from huatuo_vision.training.checkpoint import fault_of
    from huatuo_vision.training.phase import load_start, save_trained
    from huatuo_vision.training.run import start_of
    from huatuo_vision.training.trainer import TRAINABLE_WEIGHTS, load_trainable, trainable_weights

    if out.exists():
        raise UserError(f"--out {out} exists; name another folder")
    checkpoint = checkpoint.resolve()
    if fault := fault_of(checkpoint):
        raise UserError(f"{checkpoint} is no whole checkpoint: {fault}; name another")
    folder = checkpoint.parent
    if not (folder / "recipe.yaml").is_file() or folder.name not in PHASE_NAMES:
        raise UserError(
            f"{checkpoint} lies in no run's folder; expected RUN/PHASE/{checkpoint.name} as train.py left it"
        )
    recipe = load_recipe(folder / "recipe.yaml")
    phase, start = recipe.phases[folder.name], start_of(recipe, folder.name, folder.parent)
    model = load_start(recipe, folder.name, start, torch.device("cpu"))
    if (checkpoint / SHARDED_WEIGHTS).is_dir():
        import torch.distributed.checkpoint as sharded

        weights = {"model": model.state_dict()}
        sharded.load(weights, checkpoint_id=checkpoint / SHARDED_WEIGHTS, no_dist=True)
        model.load_state_dict(weights["model"])
    elif (checkpoint / TRAINABLE_WEIGHTS).is_file():
        load_trainable(checkpoint, model)
    else:
        weights = _deepspeed_weights(checkpoint)
        _, left_over = model.load_state_dict(weights, strict=False)  # of an adapter only what trains is saved
        assert not left_over and trainable_weights(model).keys() <= weights.keys(), "another phase's weights"
    with replacing(out) as new:
        save_trained(model, model.state_dict(), start, new, phase)


def _deepspeed_weights(checkpoint: Path) -> dict[str, Tensor]:
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError:
        raise UserError(
            f"{checkpoint} was written by DeepSpeed, which is not installed here; pip install --no-build-isolation "
            "-r requirements-gpu.txt"
        ) from None
    return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m huatuo_vision.training.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="RUN/PHASE/checkpoint-N")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the model folder to write")
    arguments = parser.parse_args()
    export_checkpoint(arguments.checkpoint, arguments.out)


if __name__ == "__main__":
    run_command(main)
