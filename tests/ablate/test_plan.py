"""What is finished, what is open, what is shared."""

import re
from pathlib import Path

import pytest
from rich.console import Console

from huatuo_vision.ablate.parts import slurm_script, write_slurm
from huatuo_vision.ablate.plan import show_plan
from huatuo_vision.schema import UserError
from tests.ablate.conftest import plan_of, pretend_evaluated, pretend_trained


def test_every_row_is_trained_with_every_seed_and_evaluated(folder: Path):
    plan = plan_of(folder)
    assert [(run.row.label, run.seed) for run in plan.runs] == [
        (label, seed) for seed in (0, 1) for label in ("tiny", "no alignment", "longer")
    ]
    assert len(plan.parts) == 6 + 6 + 2  # trainings, evaluations, the base without pictures
    train = next(part for part in plan.parts if part.name == "train-tiny-seed1")
    assert train.command[0] == "train.py" and "seed=1" in train.command
    blind = [part for part in plan.parts if "--blind" in part.command]
    assert [part.name for part in blind] == ["evaluate-tiny-seed0-blind", "evaluate-tiny-seed1-blind"]


def test_equal_phases_are_trained_once(folder: Path):
    plan = plan_of(folder)
    shared = {run.name: (run.donor.name if run.donor else None, run.shared) for run in plan.runs}
    assert shared["tiny-seed0"] == (None, ())
    assert shared["tiny-longer-seed0"] == ("tiny-seed0", ("align",))
    assert shared["tiny-longer-seed1"] == ("tiny-seed1", ("align",))  # another seed is another training
    assert shared["tiny-no-alignment-seed0"] == (None, ())
    longer = next(part for part in plan.parts if part.name == "train-tiny-longer-seed1")
    assert longer.after == ("train-tiny-seed1",)
    assert Path(longer.command[-1].removeprefix("reuse=")).name == "tiny-seed1"


def test_what_is_finished_is_not_run_again(folder: Path):
    plan = plan_of(folder)
    first = plan.runs[0]
    pretend_trained(first)
    pretend_evaluated(plan, first, {1, 2}, 4)
    finished = {part.name for part in plan_of(folder).parts if part.finished}
    assert finished == {"train-tiny-seed0", "evaluate-tiny-seed0"}


def test_a_training_of_another_recipe_is_refused(folder: Path):
    pretend_trained(plan_of(folder).runs[0])
    text = (folder / "tiny.yaml").read_text()
    (folder / "tiny.yaml").write_text(text.replace("global_batch_size: 8", "global_batch_size: 4"))
    with pytest.raises(UserError, match=r"tiny-seed0 holds phase align of another recipe .*global_batch_size differ"):
        plan_of(folder)


def test_scores_of_an_earlier_training_do_not_count(folder: Path):
    plan = plan_of(folder)
    run = plan.runs[0]
    pretend_trained(run)
    pretend_evaluated(plan, run, {1}, 4)
    for record in run.folder.glob("*/model/run.json"):
        import os
        import time

        os.utime(record, (time.time() + 60, time.time() + 60))
    assert "evaluate-tiny-seed0" in {part.name for part in plan_of(folder).open}


def test_overrides_reach_every_training_and_its_fingerprint(folder: Path):
    from huatuo_vision.ablate.plan import make_plan

    plan = plan_of(folder)
    other = make_plan(plan.loaded, folder / "runs", ["phases.instruct.epochs=3"])
    assert all("phases.instruct.epochs=3" in part.command for part in other.parts if part.kind == "train")
    assert plan.runs[0].recipe.fingerprint() != other.runs[0].recipe.fingerprint()


def test_no_seed_is_pushed_over_another(folder: Path):
    text = (folder / "tiny.yaml").read_text() + "hub: {repo_id: me/tiny, license: mit, push: final}\n"
    assert not any("hub.push=never" in part.command for part in plan_of(folder).parts)
    (folder / "tiny.yaml").write_text(text)
    trainings = [part for part in plan_of(folder).parts if part.kind == "train"]
    assert all("hub.push=never" in part.command for part in trainings)


def printed(plan) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show_plan(plan, console)
    return console.export_text()


def test_the_plan_says_what_is_shared_and_how_small_a_difference_can_be_seen(folder: Path):
    plan = plan_of(folder)
    text = printed(plan)
    assert re.search(r"longer +│ 0 +│ as tiny │ to do", text)
    assert re.search(r"no alignment +│ 0 +│ – +│ to do", text)
    assert "8 phases to train, 2 taken over from another row, 8 evaluations" in text
    assert re.search(r"phantom +│ +600 │ +5.1 │", text)  # (1.96 + 0.84) sqrt(0.2 / 600)
    for run in plan.runs:
        pretend_trained(run)
    assert "0 phases to train" in printed(plan_of(folder))


def test_slurm_scripts_wait_for_what_they_need(folder: Path, tmp_path: Path):
    slurm = {"train": ["--gres=gpu:8", "--time=48:00:00"], "evaluate": ["--gres=gpu:1"], "setup": ["module load cuda"]}
    launch = {"arguments": ["--num_processes", "8"], "environment": {"OMP_NUM_THREADS": "8"}}
    plan = plan_of(folder, slurm=slurm, launch=launch)
    longer = next(part for part in plan.parts if part.name == "train-tiny-longer-seed0")
    script = slurm_script(plan, longer)
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash"
    for line in ("#SBATCH --gres=gpu:8", "#SBATCH --requeue", "module load cuda", "export OMP_NUM_THREADS=8"):
        assert line in lines
    assert lines.index("module load cuda") < len(lines) - 1
    assert re.fullmatch(
        r"accelerate launch --num_processes 8 train.py --recipe \S+tiny-longer.yaml --out \S+tiny-longer-seed0 "
        r"--set seed=0 --set reuse=\S+tiny-seed0",
        lines[-1],
    )
    write_slurm(plan, tmp_path / "jobs", ["set.yaml"], Console(quiet=True))
    submit = (tmp_path / "jobs" / "submit.sh").read_text()
    number = {part.name: f"job{n}" for n, part in enumerate(plan.open)}
    for part in plan.open:
        needs = "".join(f":${number[name]}" for name in part.after)
        dependency = f" --dependency=afterok{needs}" if needs else ""
        assert f"{number[part.name]}=$(sbatch --parsable{dependency} {part.name}.sbatch)" in submit
        assert (tmp_path / "jobs" / f"{part.name}.sbatch").is_file()
    assert submit.splitlines()[-1].startswith("sbatch --dependency=afterok:$job0:") and "report.sbatch" in submit
    assert "python -m huatuo_vision.ablate set.yaml" in (tmp_path / "jobs" / "report.sbatch").read_text()
