"""With activations computed anew in the backward pass: the same losses and gradients, for less memory."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from timm.layers import DropPath
from torch import Tensor, nn

from quarterlight.ssl.config import DecoderConfig
from quarterlight.ssl.encoders import build_encoder
from quarterlight.ssl.export import ModelSpec, export_weights
from quarterlight.ssl.mae import attach_decoder
from quarterlight.ssl.recompute import checkpoint_blocks, transformer_blocks

VIT = ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3})
ROPE = ("vit_small_patch16_rope_224", VIT[1])
HYBRID = ("vit_small_resnet26d_224", {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3})
NARROW = {"img_size": 64, "window_size": 2, "embed_dim": 12, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 2)}
SWIN = ("swin_tiny_patch4_window7_224", NARROW)
SWIN_V2 = ("swinv2_tiny_window8_256", NARROW)
SIMMIM = {"decoder": {"name": "linear"}, "encode_masked": True}
CASES: dict[str, tuple[tuple[str, dict[str, Any]], dict[str, Any] | None]] = {  # None: timm's classifier
    "ViT": (VIT, {}),
    "ViT, cross": (VIT, {"decoder": {"name": "cross"}, "pred_share": 0.5}),
    "ViT, mask tokens": (VIT, {"encode_masked": True}),
    "rotary": (ROPE, {}),
    "hybrid": (HYBRID, {}),
    "Swin": (SWIN, {}),
    "Swin v2": (SWIN_V2, {"decoder": {"multi_scale": True}}),
    "SimMIM": (SWIN, SIMMIM),
    "SimMIM, v2": (SWIN_V2, SIMMIM),
    "ViT classifier": (VIT, None),
    "Swin classifier": (SWIN, None),
    "Swin v2 classifier": (SWIN_V2, None),
}


def built(case: str, drop_path: float) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """Returns a model in float64, in training, and its loss as a function of it."""
    (name, args), options = CASES[case]
    torch.manual_seed(0)
    images = torch.randn(4, 3, args["img_size"], args["img_size"], dtype=torch.float64)
    if options is None:
        model: nn.Module = timm.create_model(name, num_classes=5, drop_path_rate=drop_path, **args)
        labels = torch.arange(4)
        return model.double().train(), lambda model: nn.functional.cross_entropy(model(images), labels)
    encoder = build_encoder(name, drop_path_rate=drop_path, **args)
    decoder = DecoderConfig(**{"embed_dim": 32, "depth": 3, "num_heads": 2, **options.get("decoder", {})})
    others = {key: value for key, value in options.items() if key != "decoder"}
    model = attach_decoder(encoder, in_chans=3, decoder=decoder, target="norm_pix", **others)
    masking = encoder.sample_masking(4, 0.5)
    return model.double().train(), lambda model: model(images, masking, only_scored=True).loss


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Returns the bytes that autograd keeps for the backward pass of `run`, each storage counted once."""
    storages: dict[int, torch.UntypedStorage] = {}  # holding them keeps an address from being given out twice

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
@pytest.mark.parametrize("case", CASES)
def test_loss_gradients_and_statistics_are_the_same(case, drop_path):
    model, loss_of = built(case, drop_path)
    assert any(isinstance(module, DropPath) for module in model.modules()) == (drop_path > 0)
    other = copy.deepcopy(model)
    checkpoint_blocks(other)
    assert len(transformer_blocks(other)) >= 3
    losses, after = [], []
    for each in (model, other):
        torch.manual_seed(3)
        losses.append(loss_of(each))
        losses[-1].backward()
        after.append(torch.rand(2))  # what is drawn next
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
    assert torch.equal(*after)
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(theirs.grad, mine.grad, rtol=1e-12, atol=1e-14, msg=name)
    for (name, mine), theirs in zip(model.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-12, atol=0, msg=name)  # running means of a stem: counted once


@pytest.mark.parametrize("case", CASES)
def test_much_less_is_kept_for_the_backward_pass(case):
    model, loss_of = built(case, 0.0)
    before = saved_bytes(lambda: loss_of(model))
    checkpoint_blocks(model)
    after = saved_bytes(lambda: loss_of(model))
    assert after < before * (0.5 if case != "hybrid" else 1)  # its stem keeps all


@pytest.mark.parametrize("case", CASES)
def test_every_block_is_computed_again_exactly_once(case):
    model, loss_of = built(case, 0.0)
    runs: Counter[nn.Module] = Counter()
    for block in transformer_blocks(model):
        block.mlp.register_forward_pre_hook(lambda mlp, _: runs.update([mlp]))
    for _ in range(2):
        checkpoint_blocks(model)  # the second time changes nothing
    loss_of(model).backward()
    assert len(runs) == len(transformer_blocks(model)) and set(runs.values()) == {2}


def test_convolutional_stems_are_left_alone():
    model = timm.create_model("vit_small_r26_s32_224", img_size=64, depth=2, embed_dim=48, num_heads=3)
    assert any(name.endswith(".blocks") for name, _ in model.patch_embed.named_modules())
    assert transformer_blocks(model) == list(model.blocks)


@pytest.mark.parametrize("case", CASES)
def test_keys_stay_and_a_copy_is_a_copy(case, tmp_path):
    model, loss_of = built(case, 0.0)
    keys = list(model.state_dict())
    checkpoint_blocks(model)
    assert list(model.state_dict()) == keys
    again = copy.deepcopy(model)
    for block, copied in zip(transformer_blocks(model), transformer_blocks(again), strict=True):
        assert copied.recomputed and copied.forward.args[0].__self__ is copied is not block
    wanted = loss_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(loss_of(again), wanted, rtol=1e-12, atol=0)
    name, args = CASES[case][0]
    timms = model if CASES[case][1] is None else model.encoder.timm
    export_weights(tmp_path / "x.safetensors", timms, ModelSpec(name, args, (0.5,) * 3, (0.5,) * 3), {})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert set(file.keys()) == set(timms.state_dict())


@pytest.mark.parametrize("case", ["ViT", "Swin", "Swin v2 classifier"])
def test_without_gradients_nothing_is_kept_and_nothing_changes(case):
    model, loss_of = built(case, 0.0)
    wanted = loss_of(model.eval())
    checkpoint_blocks(model)
    with torch.no_grad():
        assert torch.equal(loss_of(model), wanted.detach())
    with torch.inference_mode():
        assert torch.equal(loss_of(model), wanted.detach())


def test_under_autocast_the_second_time_computes_in_the_same_precision():
    model, loss_of = built("Swin", 0.0)
    model.float()
    (name, args), _ = CASES["Swin"]
    images = torch.randn(4, 3, 64, 64)
    masking = model.encoder.sample_masking(4, 0.5)
    found = []
    for _ in range(2):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images, masking, only_scored=True).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        checkpoint_blocks(model)
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))
