"""A packed row is the samples in it, each on its own: losses, gradients, and against stock transformers."""

import copy

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlavaForConditionalGeneration

from huatuo_vision.inputs.encode import Encoded
from huatuo_vision.inputs.rows import pack_row
from huatuo_vision.model import llava
from huatuo_vision.model.attention import PER_SAMPLE, choose_attention
from huatuo_vision.model.llava import PackedLlava, recompute, skip_unread_layers
from huatuo_vision.schema import UserError
from tests.model.tiny import IMAGE_SIZE, IMAGE_TOKEN, PATCHES, VOCABULARY, tiny_config

MODEL_INPUTS = (
    "input_ids",
    "position_ids",
    "logits_to_keep",
    "shift_labels",
    "target_counts",
    "cu_seq_lens",
    "sample_lengths",
    "pixel_values",
    "image_positions",
)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "mistral"])
def model(request) -> PackedLlava:
    torch.manual_seed(0)
    model = PackedLlava(tiny_config(text=request.param, feature_layer=-1))
    model.set_attn_implementation({"text_config": PER_SAMPLE, "vision_config": "sdpa"})
    return model.train()


def sample(seed: int, images: int) -> tuple[Encoded, np.ndarray]:
    rng = np.random.default_rng(seed)
    text = rng.integers(4, VOCABULARY, rng.integers(8, 30))
    ids = np.concatenate([np.full(PATCHES * images, IMAGE_TOKEN), text]).astype(np.int64)
    supervised = np.zeros(len(ids), dtype=bool)
    supervised[-5:] = True
    supervised[PATCHES * images + 1] = True  # an earlier turn
    return Encoded(ids, supervised), rng.standard_normal((images, 3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)


def row(*samples: tuple[Encoded, np.ndarray]) -> dict:
    pixels = np.concatenate([pixels for _, pixels in samples])
    return pack_row(
        [e for e, _ in samples],
        list(range(len(samples))),
        pixels if len(pixels) else None,
        step_targets=1,
        image_token_id=IMAGE_TOKEN,
    )


def losses(model: PackedLlava, packed: dict) -> torch.Tensor:
    """(D,) summed loss of each sample: each comes from a source of its own."""
    return model(**{key: packed[key] for key in MODEL_INPUTS if key in packed})


SAMPLES = [sample(seed, images) for seed, images in enumerate([1, 0, 2, 1, 3])]


def gradients(model: PackedLlava) -> dict[str, torch.Tensor]:
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def test_packed_equals_one_sample_per_row(model):
    packed = losses(model, row(*SAMPLES))
    packed.sum().backward()
    packed_gradients = gradients(model)
    alone = torch.cat([losses(model, row(s)) for s in SAMPLES])
    alone.sum().backward()
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(packed_gradients[name], gradient, atol=2e-5, rtol=1e-4, msg=name)


def test_losses_are_those_of_stock_transformers(model):
    stock = LlavaForConditionalGeneration(copy.deepcopy(model.config))
    stock.load_state_dict(model.state_dict())
    stock.set_attn_implementation("eager")
    for encoded, pixels in SAMPLES:
        labels = torch.from_numpy(np.where(encoded.supervised, encoded.input_ids, -100))[None]
        with torch.no_grad():
            expected = stock(
                input_ids=torch.from_numpy(encoded.input_ids)[None],
                attention_mask=torch.ones(1, len(encoded.input_ids), dtype=torch.long),
                pixel_values=torch.from_numpy(pixels) if len(pixels) else None,
                labels=labels,
            ).loss
            got = losses(model, row((encoded, pixels))) / encoded.targets
        torch.testing.assert_close(got[0], expected, atol=2e-6, rtol=0)


def test_a_change_in_one_sample_reaches_no_other(model):
    before = losses(model, row(*SAMPLES))
    changed_ids = SAMPLES[1][0].input_ids.copy()
    changed_ids[0] = (changed_ids[0] + 1) % VOCABULARY
    changed = (Encoded(changed_ids, SAMPLES[1][0].supervised), SAMPLES[1][1])
    after = losses(model, row(SAMPLES[0], changed, *SAMPLES[2:]))
    others = [0, 2, 3, 4]
    assert torch.equal(before[others], after[others])
    assert not torch.allclose(before[1], after[1])


def test_images_go_to_their_own_placeholders(model):
    (first, pixels_a), (second, pixels_b) = SAMPLES[0], SAMPLES[3]
    right = losses(model, row((first, pixels_a), (second, pixels_b)))
    swapped = losses(model, row((first, pixels_b), (second, pixels_a)))
    assert not torch.allclose(right, swapped, atol=1e-4)


def test_a_row_without_images_still_reaches_the_projector(model):
    loss = losses(model, row(SAMPLES[1])).sum()
    loss.backward()
    grads = gradients(model)
    touched = {name: g for name, g in grads.items() if "multi_modal_projector" in name or "vision_tower" in name}
    assert any("multi_modal_projector" in name for name in touched)
    assert all((g == 0).all() for g in touched.values())


class HostWaits(TorchDispatchMode):
    """Records the operations whose result has a size or a value that a CUDA device would have to tell the host."""

    WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "masked_scatter_backward", "equal", "_unique2"}

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        indices = args[1] if name in ("index.Tensor", "index_put", "index_put_", "_index_put_impl_") else ()
        if name in self.WAITING or any(i is not None and i.dtype == torch.bool for i in indices):
            self.found.append(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("images", [True, False])
def test_no_operation_of_forward_and_backward_waits_for_the_device(model, images):
    packed = row(*SAMPLES) if images else row(SAMPLES[1])
    with HostWaits() as waits:
        losses(model, packed).sum().backward()
    model.zero_grad()
    assert not waits.found
    with waits:  # what the images were found by once
        source = torch.ones(4, requires_grad=True)
        torch.zeros(4).masked_scatter(torch.ones(4, dtype=torch.bool), source).sum().backward()
    assert waits.found


def test_recomputing_activations_changes_nothing(model):
    packed = row(*SAMPLES)
    losses(model, packed).sum().backward()
    plain = gradients(model)
    again = copy.deepcopy(model)
    recompute(again, 1)
    losses(again, packed).sum().backward()
    for name, gradient in gradients(again).items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-6, rtol=1e-5, msg=name)


def test_every_second_layer_is_recomputed(model):
    some = copy.deepcopy(model)
    recompute(some, 2)
    assert [layer.gradient_checkpointing for layer in some.model.language_model.layers] == [True, False]


def test_the_chunked_loss_and_its_gradients_are_those_of_whole_logits(model, monkeypatch):
    if llava._CHUNKED is None:
        pytest.skip("this torch has no chunked linear_cross_entropy")
    packed = row(*SAMPLES)
    weights = torch.arange(1.0, 6.0)  # each source's loss reaches its own samples
    chunked = losses(model, packed)
    (chunked * weights).sum().backward()
    chunked_gradients = gradients(model)
    monkeypatch.setattr(llava, "_CHUNKED", None)
    whole = losses(model, packed)
    (whole * weights).sum().backward()
    torch.testing.assert_close(chunked, whole, atol=2e-5, rtol=0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(chunked_gradients[name], gradient, atol=5e-5, rtol=1e-4, msg=name)


def test_interleaved_sources_are_summed_apart(model):
    pixels = np.concatenate([pixels for _, pixels in SAMPLES])
    mixed = pack_row([e for e, _ in SAMPLES], [2, 0, 2, 0, 2], pixels, 1, IMAGE_TOKEN)
    alone = losses(model, row(*SAMPLES))
    assert mixed["target_sources"] == (0, 2)
    expected = torch.stack([alone[[1, 3]].sum(), alone[[0, 2, 4]].sum()])
    torch.testing.assert_close(losses(model, mixed), expected, atol=2e-5, rtol=0)


def test_layers_that_nothing_reads_change_nothing():
    config = tiny_config(text="llama", feature_layer=-2)
    torch.manual_seed(0)
    whole = PackedLlava(config)
    whole.set_attn_implementation({"text_config": PER_SAMPLE, "vision_config": "sdpa"})
    cut = copy.deepcopy(whole)
    skip_unread_layers(cut)
    ran = []
    for model_, name in ((whole, "whole"), (cut, "cut")):
        last = model_.model.vision_tower.encoder.layers[-1].mlp
        last.register_forward_hook(lambda *_, name=name: ran.append(name))
    assert torch.equal(losses(whole, row(*SAMPLES)), losses(cut, row(*SAMPLES)))
    assert ran == ["whole"]
    assert cut.state_dict().keys() == whole.state_dict().keys()


def test_no_target_crosses_a_seam():
    everything = [Encoded(e.input_ids, np.ones(len(e.input_ids), dtype=bool)) for e, _ in SAMPLES[:2]]
    packed = pack_row(everything, [0, 1], None, step_targets=1, image_token_id=IMAGE_TOKEN)
    seam = len(everything[0].input_ids)
    assert seam - 1 not in packed["logits_to_keep"].tolist()
    assert packed["stats"]["targets"] == sum(len(e.input_ids) - 1 for e in everything)
    assert packed["target_sources"] == (0, 1)
    assert packed["target_counts"] == tuple(len(e.input_ids) - 1 for e in everything)


@pytest.mark.parametrize("asked", ["varlen", "flash_attention_2"])
def test_an_attention_that_can_not_run_here_is_refused(asked):
    with pytest.raises(UserError, match=f"attention: {asked} needs a CUDA device"):
        choose_attention(asked, device=torch.device("cpu"), precision="bf16")
    assert choose_attention("auto", device=torch.device("cpu"), precision="bf16") == PER_SAMPLE
