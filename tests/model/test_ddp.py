"""Two processes, one of whose rows has no image: nobody waits, and the gradients are those of one process."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from huatuo_vision.model.attention import PER_SAMPLE
from huatuo_vision.model.llava import PackedLlava
from huatuo_vision.model.trainable import apply_training
from huatuo_vision.recipe import TrainSpec
from tests.model.test_packing import SAMPLES, losses, row
from tests.model.tiny import tiny_config
from tests.model.tiny_multi import multi_config, packed_multi
from tests.model.tiny_multi import row as multi_row
from tests.model.tiny_multi import sample as multi_sample

MULTI_SAMPLES = [multi_sample(multi_config(), seed=0, images=1), multi_sample(multi_config(), seed=1, images=0)]


def make_model() -> PackedLlava:
    torch.manual_seed(0)
    model = PackedLlava(tiny_config(feature_layer=[1, 3]))
    model.set_attn_implementation({"text_config": PER_SAMPLE, "vision_config": "sdpa"})
    model.model.vision_tower.post_layernorm.requires_grad_(False)  # never read
    return model.train()


def train_two_steps(rank: int, port_file: str, out: str) -> None:
    two_steps(rank, port_file, out, make_model(), row(SAMPLES[rank]))  # SAMPLES[1] is text only


def two_steps(rank: int, port_file: str, out: str, model: torch.nn.Module, packed: dict) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=2)
    ddp = DistributedDataParallel(model)
    for _ in range(2):  # a gradient that never came is noticed in the step after
        model.zero_grad()
        (losses(ddp, packed).sum() * 2).backward()  # DDP averages
    if rank == 0:
        torch.save({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, out)
    # Before the group: as the group's last owner it waits, holding the interpreter's lock, for a thread that needs it.
    del ddp
    dist.destroy_process_group()


def test_a_rank_without_images(tmp_path):
    mp.spawn(train_two_steps, (str(tmp_path / "rendezvous"), str(tmp_path / "grads.pt")), nprocs=2)
    model = make_model()
    losses(model, row(SAMPLES[0], SAMPLES[1])).sum().backward()
    gathered = torch.load(tmp_path / "grads.pt", weights_only=True)
    assert gathered.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gathered[name], parameter.grad, atol=2e-5, rtol=1e-4, msg=name)


def train_several(rank: int, port_file: str, out: str) -> None:
    two_steps(rank, port_file, out, several_encoders(), multi_row(MULTI_SAMPLES[rank]))


def several_encoders() -> torch.nn.Module:
    everything = TrainSpec(vision_encoder={"lr": 1e-4}, projector={"lr": 1e-3}, language_model={"lr": 1e-3})
    return apply_training(packed_multi(), everything)


def test_a_rank_without_images_and_several_encoders(tmp_path):
    mp.spawn(train_several, (str(tmp_path / "rendezvous"), str(tmp_path / "grads.pt")), nprocs=2)
    model = several_encoders()
    losses(model, multi_row(*MULTI_SAMPLES)).sum().backward()
    gathered = torch.load(tmp_path / "grads.pt", weights_only=True)
    assert gathered.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, gradient in gathered.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, atol=5e-5, rtol=1e-3, msg=name)
