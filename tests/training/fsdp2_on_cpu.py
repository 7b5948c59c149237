"""train.py under FSDP2 on CPU processes, for a test.

accelerate shards on accelerators only and would run DDP here without a word; this opens the door that it keeps shut.
"""

import os

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"

from accelerate import PartialState, state  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402
from transformers import TrainingArguments  # noqa: E402

state.PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_GPU)

from huatuo_vision.training import phase, run  # noqa: E402

run.start_processes = PartialState
phase.TrainingArguments = lambda **arguments: TrainingArguments(**arguments | {"use_cpu": False})

if __name__ == "__main__":
    import train

    train.main()
