"""timm's Swins as encoders: equal to timm with nothing masked, else to timm with hidden tokens forbidden as keys.

The slow reference is timm's own forward pass over all tokens. Images and windows are the real ones; widths and depths
are small (swin_base has its own width and heads but 4 blocks instead of 18 in its third stage), and one test runs
models as they are.
"""

import copy
import functools
import pickle
import re

import numpy as np
import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models.swin_transformer import window_partition
from torch import Tensor, nn

from quarterlight.ssl.attention import attend
from quarterlight.ssl.encoders import build_encoder
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.masking import Masking, MaskSampler, random_masking
from quarterlight.ssl.packing import unit_order
from quarterlight.ssl.swin import SwinEncoder

SWIN, SWIN_V2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"
NARROW = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 3, 4)}
WIDE = {"img_size": (64, 128), **NARROW}
VARIANTS = {
    "swin_tiny w7/224": (SWIN, NARROW),
    "swin_base w7/224": ("swin_base_patch4_window7_224", {"depths": (2, 2, 4, 2)}),
    "swin_tiny w12/384": (SWIN, {"img_size": 384, "window_size": 12, **NARROW}),
    "swinv2_tiny w8/256": (SWIN_V2, NARROW),
    "swin_s3_tiny": ("swin_s3_tiny_224", NARROW),
    "64 x 128, w4": (SWIN, {"window_size": 4, **WIDE}),
    "64 x 128, w4x8": (SWIN, {"window_size": (4, 8), **WIDE}),
    "64 x 128, w8x4, v2": (SWIN_V2, {"window_size": (8, 4), **WIDE}),
    "128 x 64, w2, always partition": (
        SWIN,
        {"img_size": (128, 64), "window_size": 2, "always_partition": True, **NARROW},
    ),
    "three stages, patch 2, grey": (
        SWIN,
        {"img_size": 32, "patch_size": 2, "in_chans": 1, "window_size": 4}
        | {"embed_dim": 24, "depths": (2, 2, 2), "num_heads": (1, 2, 3)},
    ),
}  # fmt: skip


def shaken(name: str, args: dict) -> SwinEncoder:
    """Returns an encoder in float64 whose every parameter is random, so that no path is hidden behind a zero."""
    torch.manual_seed(0)
    encoder = build_encoder(name, **args).double().eval()
    for parameter in encoder.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, dtype=torch.float64)
    assert isinstance(encoder, SwinEncoder)
    return encoder


@functools.cache
def shared(variant: str) -> SwinEncoder:
    """Returns the encoder of a variant; made once, as the shapes of its groups take a second. Not to be changed."""
    return shaken(*VARIANTS[variant])


def random_images(encoder: SwinEncoder, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    channels = encoder.timm.patch_embed.proj.in_channels
    return torch.randn(batch, channels, *encoder.img_size, generator=generator, dtype=torch.float64)


def forbidding_hidden_keys(swin: nn.Module, masking: Masking, grid: tuple[int, int]) -> nn.Module:
    """Returns a copy of the timm model that computes all tokens, but in which nothing attends to a hidden one.

    timm's `attn_mask` is for all images; here each window of each image gets one of its own. Not -inf, as in windows
    without a visible token nothing would remain; in float64 exp(-1e9) is 0 as well.
    """
    swin = copy.deepcopy(swin)
    visible = ~masking.is_masked.view(-1, *grid)
    for stage in swin.layers:
        for block in stage.blocks:
            high, wide = (size // units for size, units in zip(block.input_resolution, grid, strict=True))
            tokens = visible.repeat_interleave(high, 1).repeat_interleave(wide, 2)
            tokens = tokens.roll([-shift for shift in block.shift_size], dims=(1, 2))
            keys = window_partition(tokens[:, :, :, None], block.window_size).flatten(1)  # [B * windows, A]
            mask = torch.where(keys, 0.0, -1e9).double()[:, None].repeat(1, keys.shape[1], 1)
            if block.attn_mask is not None:
                mask += block.attn_mask.repeat(len(visible), 1, 1)
            block.attn_mask = mask
    return swin


def of_kept(tokens: Tensor, masking: Masking) -> Tensor:
    """Returns those of all tokens that belong to kept units, in the order of `ids_keep`."""
    return torch.stack([image[ids] for image, ids in zip(tokens, masking.ids_keep, strict=True)])


def noise_in_hidden_places(images: Tensor, masking: Masking, encoder: SwinEncoder) -> Tensor:
    hidden = masking.is_masked.view(-1, 1, *encoder.grid)
    hidden = hidden.repeat_interleave(encoder.unit_size, 2).repeat_interleave(encoder.unit_size, 3)
    return torch.where(hidden, images * 100 * torch.randn_like(images), images)


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_nothing_masked_it_is_timms_forward_features(variant):
    encoder = shared(variant)
    images, masking = random_images(encoder), encoder.sample_masking(2, 0.0)
    assert masking.ids_keep.shape == (2, encoder.num_units) and not masking.is_masked.any()
    narrower = copy.deepcopy(encoder).float()
    with torch.no_grad():
        for model, dtype, tolerance in ((encoder, torch.float64, 1e-10), (narrower, torch.float32, 1e-5)):
            x = images.to(dtype)
            wanted = model.timm.forward_features(x).flatten(1, 2)
            torch.testing.assert_close(model(x), wanted, atol=tolerance, rtol=0)
            torch.testing.assert_close(model(x, masking), of_kept(wanted, masking), atol=tolerance, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_masked_it_is_timm_with_the_hidden_tokens_forbidden_as_keys(variant):
    encoder = shared(variant)
    images, masking = random_images(encoder), encoder.sample_masking(2, 0.75)
    assert masking.packing is not None
    assert_equals_reference(encoder, images, masking, masking._replace(packing=None))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        (SWIN, {}),
        (SWIN, {"img_size": 384, "window_size": 12}),
        ("swin_base_patch4_window7_224", {}),
        ("swin_s3_tiny_224", {}),
        (SWIN_V2, {}),
    ],
)
def test_models_in_their_own_widths_and_depths_are_timms(name, args):
    encoder = shaken(name, args)
    images, masking = random_images(encoder, 1), encoder.sample_masking(1, 0.75)
    everything = encoder.sample_masking(1, 0.0)
    with torch.no_grad():
        wanted = of_kept(encoder.timm.forward_features(images).flatten(1, 2), everything)
        torch.testing.assert_close(encoder(images, everything), wanted, atol=1e-10, rtol=0)
        reference = forbidding_hidden_keys(encoder.timm, masking, encoder.grid)
        wanted = of_kept(reference.forward_features(images).flatten(1, 2), masking)
        torch.testing.assert_close(encoder(images, masking), wanted, atol=1e-9, rtol=0)


@pytest.mark.parametrize("variant", ["swin_tiny w7/224", "swin_s3_tiny", "64 x 128, w4", "64 x 128, w8x4, v2"])
def test_masks_drawn_elsewhere_are_laid_out_by_the_encoder(variant):
    encoder = shared(variant)
    masking = random_masking(3, encoder.num_units, 0.4, generator=torch.Generator().manual_seed(2))
    assert masking.packing is None
    assert_equals_reference(encoder, random_images(encoder, 3), masking)


def assert_equals_reference(encoder: SwinEncoder, images: Tensor, *maskings: Masking) -> None:
    """Compares outputs and all gradients; the maskings differ in their packing only."""
    reference = forbidding_hidden_keys(encoder.timm, maskings[0], encoder.grid)
    wanted = of_kept(reference.forward_features(images).flatten(1, 2), maskings[0])
    weights = torch.randn_like(wanted)
    wanted_gradients = torch.autograd.grad((wanted * weights).sum(), list(reference.parameters()))
    names, parameters = zip(*encoder.timm.named_parameters(), strict=True)
    for masking in maskings:
        tokens = encoder(images, masking)
        torch.testing.assert_close(tokens, wanted, atol=1e-9, rtol=0)
        gradients = torch.autograd.grad((tokens * weights).sum(), parameters)
        for name, gradient, wanted_gradient in zip(names, gradients, wanted_gradients, strict=True):
            error = (gradient - wanted_gradient).norm() / wanted_gradient.norm().clamp_min(1e-3)
            assert error < 1e-9, name


def test_logit_scales_of_the_second_version_are_limited_as_timms():
    encoder = copy.deepcopy(shared("64 x 128, w8x4, v2"))
    for name, parameter in encoder.named_parameters():
        if name.endswith("logit_scale"):
            parameter.data[-1] = 6.0  # more than log(100)
    assert_equals_reference(encoder, random_images(encoder), encoder.sample_masking(2, 0.5))


@pytest.mark.parametrize(("strategy", "mask_unit"), [("block", None), ("grid", None), ("random", 64)])
def test_masks_of_every_kind_are_laid_out(strategy, mask_unit):
    encoder = shared("swinv2_tiny w8/256")
    masking = encoder.sample_masking(2, 0.6, strategy=strategy, mask_unit=mask_unit)
    reference = forbidding_hidden_keys(encoder.timm, masking, encoder.grid)
    images = random_images(encoder)
    with torch.no_grad():
        wanted = of_kept(reference.forward_features(images).flatten(1, 2), masking)
        torch.testing.assert_close(encoder(images, masking), wanted, atol=1e-9, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_pixels_change_the_output_by_exactly_nothing_in_training(variant):
    encoder = copy.deepcopy(shared(variant)).float().train()
    images, masking = random_images(encoder).float(), encoder.sample_masking(2, 0.75)
    torch.manual_seed(0)
    disturbed = noise_in_hidden_places(images, masking, encoder)
    assert not torch.equal(disturbed, images)
    assert torch.equal(encoder(disturbed, masking), encoder(images, masking))
    assert torch.equal(
        encoder(disturbed, masking._replace(packing=None)), encoder(images, masking._replace(packing=None))
    )


def test_an_image_does_not_depend_on_the_others_of_its_batch():
    encoder = shared("64 x 128, w4")
    images, masking = random_images(encoder, 6), encoder.sample_masking(6, 0.5)
    together = encoder(images, masking)
    for b in range(6):
        alone = masking.ids_keep[b : b + 1], masking.ids_restore[b : b + 1], masking.is_masked[b : b + 1]
        tokens = encoder(images[b : b + 1], Masking(*alone))
        torch.testing.assert_close(tokens, together[b : b + 1], atol=1e-10, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_is_timms_and_every_trainable_parameter_gets_a_gradient(variant):
    name, args = VARIANTS[variant]
    encoder = copy.deepcopy(shared(variant)).float().train()
    timm.create_model(name, num_classes=0, **args).load_state_dict(encoder.timm.state_dict(), strict=True)
    assert encoder.state_dict().keys() == {f"timm.{key}" for key in encoder.timm.state_dict()}
    encoder(random_images(encoder).float(), encoder.sample_masking(2)).square().sum().backward()
    idle = [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle


def test_a_classification_head_is_not_trained():
    encoder = build_encoder(SWIN, num_classes=5, window_size=4, **WIDE)
    assert not any(parameter.requires_grad for parameter in encoder.timm.head.parameters())
    assert all(p.requires_grad for name, p in encoder.timm.named_parameters() if not name.startswith("head."))


@pytest.mark.parametrize(
    "variant", [variant for variant in VARIANTS if variant not in ("swin_base w7/224", "swin_tiny w12/384")]
)
def test_every_stage_holds_timms_tokens_of_the_kept_units(variant):
    encoder = shared(variant)
    images, masking = random_images(encoder), encoder.sample_masking(2, 0.0)
    with torch.no_grad():
        stages = encoder.stages(images, masking)
        wanted = encoder.timm.forward_intermediates(images, norm=True, intermediates_only=True)  # [B, E, h, w] each
        assert torch.equal(stages[-1], encoder(images, masking))
    assert len(stages) == len(wanted) == len(encoder.stage_dims) == len(encoder.timm.layers)
    for tokens, features, (width, count) in zip(stages, wanted, encoder.stage_dims, strict=True):
        side = round(count**0.5)
        assert tokens.shape == (2, encoder.num_units * count, width)
        units = features.unfold(2, side, side).unfold(3, side, side)  # [B, E, units high, units wide, side, side]
        row, column = unit_order(side.bit_length() - 1)
        units = units[..., row, column].flatten(2, 3).permute(0, 2, 3, 1)  # [B, N, T, E]
        for b in range(2):
            in_order = units[b, masking.ids_keep[b]].flatten(0, 1)
            torch.testing.assert_close(tokens[b], in_order, atol=1e-10, rtol=0)


@pytest.mark.parametrize("variant", ["swin_tiny w7/224", "64 x 128, w8x4, v2", "three stages, patch 2, grey"])
def test_stages_of_a_masked_image_have_the_widths_and_counts_that_stage_dims_says(variant):
    encoder = shared(variant)
    images, masking = random_images(encoder), encoder.sample_masking(2, 0.5)
    stages, kept = encoder.stages(images, masking), masking.ids_keep.shape[1]
    assert [tuple(x.shape) for x in stages] == [(2, kept * count, width) for width, count in encoder.stage_dims]
    assert torch.equal(stages[-1], encoder(images, masking))
    assert stages[-1].shape[1:] == (kept, encoder.embed_dim)


def test_shapes_of_a_base_model_and_of_three_stages():
    encoder = shared("swin_base w7/224")
    assert (encoder.grid, encoder.unit_size, encoder.num_prefix_tokens) == ((7, 7), 32, 0)
    assert (encoder.embed_dim, encoder.mask_token_dim, encoder.img_size) == (1024, 128, (224, 224))
    assert encoder.stage_dims == [(128, 64), (256, 16), (512, 4), (1024, 1)]
    small = shared("three stages, patch 2, grey")
    assert (small.grid, small.unit_size, small.stage_dims) == ((4, 4), 8, [(24, 16), (48, 4), (96, 1)])


def test_masks_move_with_their_packing():
    masking = shared("swin_tiny w7/224").sample_masking(3)
    moved = masking.to("meta", non_blocking=True)
    assert moved.packing is not None and masking.packing is not None
    tensors = [*moved[:3], moved.packing.starts, moved.packing.redraws]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert moved.packing.shapes == masking.packing.shapes
    same = masking.to("cpu").packing
    assert same is not None and torch.equal(same.starts, masking.packing.starts)
    assert torch.equal(same.redraws, masking.packing.redraws)


@pytest.mark.parametrize("variant", ["swin_tiny w7/224", "swinv2_tiny w8/256"])
def test_shapes_do_not_change_from_batch_to_batch(variant):
    encoder = shared(variant)
    images, sampler = random_images(encoder, 3), encoder.mask_sampler(0.75)
    seen = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(tuple(args[0].shape))

    hooks = [block.mlp.register_forward_pre_hook(note) for stage in encoder.timm.layers for block in stage.blocks]
    first, second = (sampler.sample(0, np.arange(a, a + 3)) for a in (0, 3))
    assert first.packing is not None and second.packing is not None
    assert not torch.equal(first.packing.starts, second.packing.starts)
    assert first.packing.starts.shape == second.packing.starts.shape and first.packing.shapes == second.packing.shapes
    with torch.no_grad():
        for masking in (first, second):
            encoder(images, masking)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 2 * len(hooks) and seen[: len(hooks)] == seen[len(hooks) :]


@pytest.mark.parametrize(
    ("variant", "watched"),
    [("swin_tiny w7/224", ("norm1", "norm2")), ("swinv2_tiny w8/256", ("mlp",))],  # the second version norms branches
)
def test_the_sum_over_blocks_stays_in_float32_under_bf16_autocast(variant, watched):
    encoder = copy.deepcopy(shared(variant)).float().train()
    images, masking = random_images(encoder).float(), encoder.sample_masking(2, 0.75)
    seen = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].dtype)

    for stage in encoder.timm.layers:
        for block in stage.blocks:
            for name in watched:
                block.get_submodule(name).register_forward_pre_hook(note)
    exact = encoder(images, masking)
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        tokens = encoder(images, masking)
    assert seen == [torch.float32] * 8 * len(watched)
    error = (tokens.float() - exact).norm() / exact.norm()
    assert error < 0.05
    tokens.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters() if p.requires_grad)


class Scaled(nn.Module):
    """A drop path whose draws are given, one factor an image."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors.view(-1, *[1] * (x.ndim - 1))


@pytest.mark.parametrize("name", [SWIN, SWIN_V2])
def test_drop_path_drops_branches_of_whole_images(name):
    encoder = shaken(name, {"window_size": 4, "drop_path_rate": 0.6, **WIDE}).train()
    images, masking = random_images(encoder, 4), encoder.sample_masking(4, 0.5)
    factors: dict[str, Tensor] = {}

    def note(path: str, module: DropPath, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert len(args[0]) == 4
        kept = output.flatten(1).any(dim=1).double()
        factors[path] = kept / (1 - module.drop_prob)
        torch.testing.assert_close(output, Scaled(factors[path])(args[0]))

    for path, module in encoder.timm.named_modules():
        if isinstance(module, DropPath):
            module.register_forward_hook(functools.partial(note, path))
    torch.manual_seed(0)
    tokens = encoder(images, masking)
    assert len(factors) >= 12 and any(f.any() and not f.all() for f in factors.values())
    reference = forbidding_hidden_keys(encoder.timm, masking, encoder.grid)
    for path, factor in factors.items():
        reference.set_submodule(path, Scaled(factor))
    torch.testing.assert_close(
        tokens, of_kept(reference.forward_features(images).flatten(1, 2), masking), atol=1e-9, rtol=0
    )


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        (
            SWIN,
            {"img_size": 192},
            "192 makes 48 tokens in stage 1.* windows of 7 .*: use 224 pixels, or .*window_size 6",
        ),
        (SWIN, {"img_size": 288}, "image height 288 .* windows of 7 .*: use 224 or 448 pixels, .*window_size 9"),
        (
            SWIN,
            {"img_size": 230},
            "height 230 is not a multiple of the 32 pixels that end as one token: use 224 or 448",
        ),
        (SWIN, {"img_size": (224, 192)}, "image width 192 makes 48 tokens in stage 1, which windows of 7"),
        (SWIN, {"img_size": (64, 128), "window_size": (4, 6)}, "width 128 .* windows of 6 .* use 96 or 192 pixels"),
        (SWIN, {"patch_size": (4, 2)}, "its patches are 4 x 2 pixels; only square ones are supported"),
        (SWIN, {"img_size": 64, "window_size": 4, "always_partition": True}, "2 tokens in stage 4.*: use 128 pixels"),
        (SWIN_V2, {"img_size": 192}, "192 makes 12 tokens in stage 3, which windows of 8 .*: use 128 or 256 pixels"),
        ("swinv2_cr_tiny_224", {}, "a SwinTransformerV2Cr is not supported; use one of .* swin_.* or swinv2_"),
    ],
)
def test_what_windows_do_not_tile_is_refused_with_what_would_work(name, args, said):
    with pytest.raises(InputError, match=said):
        build_encoder(name, **({} if name.startswith("swinv2_cr") else NARROW) | args)


@pytest.mark.parametrize(
    ("size", "args"),
    [((192, 192), {}), ((288, 288), {}), ((64, 128), {"window_size": (4, 6)}), ((64, 64), {"always_partition": True})],
)
def test_every_way_out_that_a_refusal_names_works(size, args):
    with pytest.raises(InputError) as refusal:
        build_encoder(SWIN, img_size=size, **NARROW | args)
    sizes, _, windows = str(refusal.value).rpartition(": use ")[2].partition("encoder.args")
    assert re.findall(r"\d+", windows)
    for window in re.findall(r"\d+", windows):
        build_encoder(SWIN, img_size=size, **NARROW | args | {"window_size": int(window)})
    for side in map(int, re.findall(r"\d+", sizes)):
        build_encoder(SWIN, img_size=(side, side) if size[0] == size[1] else (size[0], side), **NARROW | args)


def test_windows_are_partitioned_and_shifted_where_the_model_always_does():
    always = shared("128 x 64, w2, always partition")
    last = always.timm.layers[-1].blocks[1]
    assert (last.window_size, last.shift_size) == ((2, 2), (1, 1)) and last.input_resolution == (4, 2)
    shrunk = build_encoder(SWIN, **NARROW, img_size=(128, 64), window_size=2)
    assert shrunk.timm.layers[-1].blocks[1].shift_size == (1, 0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda encoder: pickle.loads(pickle.dumps(encoder))])
def test_encoder_and_sampler_can_be_copied(copied):
    encoder = shared("64 x 128, w4x8")
    images, masking = random_images(encoder), encoder.sample_masking(2, 0.5)
    again = copied(encoder)
    assert torch.equal(again(images, masking), encoder(images, masking))
    same = copied(encoder.mask_sampler(0.5)).sample(0, np.arange(2))
    assert torch.equal(same.ids_keep, masking.ids_keep)
    assert torch.equal(again.sample_masking(2, 0.5).packing.starts, masking.packing.starts)


def test_a_mask_and_its_packing_depend_on_seed_and_position_only():
    sampler = shared("swin_tiny w7/224").mask_sampler(0.75)
    whole, part = sampler.sample(3, np.arange(100)), sampler.sample(3, np.arange(40, 60))
    assert torch.equal(whole.ids_keep[40:60], part.ids_keep) and torch.equal(whole.ids_restore[40:60], part.ids_restore)
    assert whole.packing is not None and part.packing is not None
    assert torch.equal(whole.packing.starts[40:60], part.packing.starts)
    assert not torch.equal(whole.ids_keep, sampler.sample(4, np.arange(100)).ids_keep)


def test_masks_that_did_not_fit_are_drawn_again_the_same_in_any_batch():
    sampler = shared("swin_tiny w7/224").mask_sampler(0.75)
    assert sampler.packer is not None
    whole = sampler.sample(0, np.arange(2000))
    assert whole.packing is not None
    redrawn = np.flatnonzero(whole.packing.redraws.numpy())
    assert 2 <= len(redrawn) <= 60
    starts, fits = sampler.packer.pack(~whole.is_masked.numpy())
    assert fits.all() and torch.equal(torch.from_numpy(starts), whole.packing.starts)
    for positions in ([redrawn[0]], redrawn[:2], range(redrawn[0] - 1, redrawn[0] + 2), redrawn[::-1]):
        part = sampler.sample(0, np.array(positions))
        assert part.packing is not None
        for mine, theirs in ((part.ids_keep, whole.ids_keep), (part.packing.starts, whole.packing.starts)):
            assert torch.equal(mine, theirs[np.array(positions)])
        assert torch.equal(part.packing.redraws, whole.packing.redraws[np.array(positions)])
    plain = type(sampler)(sampler.grid, 0.75).sample(0, np.arange(2000))
    changed = (plain.ids_keep != whole.ids_keep).any(dim=1).nonzero()[:, 0]
    assert changed.tolist() == redrawn.tolist()
    assert (whole.is_masked.sum(dim=1) == plain.is_masked.sum(dim=1)).all()


def test_redrawn_masks_encode_like_any_other():
    encoder = shared("swin_tiny w7/224")
    sampler = encoder.mask_sampler(0.75)
    whole = sampler.sample(0, np.arange(2000))
    assert whole.packing is not None
    masking = sampler.sample(0, np.flatnonzero(whole.packing.redraws.numpy())[:2])
    images = random_images(encoder)
    reference = forbidding_hidden_keys(encoder.timm, masking, encoder.grid)
    with torch.no_grad():
        wanted = of_kept(reference.forward_features(images).flatten(1, 2), masking)
        torch.testing.assert_close(encoder(images, masking), wanted, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_in_bf16_on_a_cpu_attention_runs_in_bf16_by_the_faster_kernel(name, monkeypatch):
    encoder = build_encoder(name, img_size=128, **({"window_size": 4} if "v2" not in name else {}), **NARROW)
    seen = []

    def spy(q, k, v, bias, **options):
        seen.append({x.dtype for x in (q, k, v, bias)})
        return attend(q, k, v, bias, **options)

    monkeypatch.setattr("quarterlight.ssl.swin.attend", spy)
    with torch.autocast("cpu", torch.bfloat16):
        encoder(torch.randn(2, 3, 128, 128), encoder.sample_masking(2))
    assert len(seen) == sum(len(stage.blocks) for stage in encoder.timm.layers)
    assert all(types == {torch.bfloat16} for types in seen)


@pytest.mark.parametrize(("name", "watched"), [(SWIN, ""), (SWIN_V2, "mlp")])  # the second version norms branches
def test_with_mask_tokens_the_residual_stream_stays_in_full_precision_too(name, watched):
    encoder = build_encoder(name, img_size=128, window_size=4, **NARROW)
    types = []
    for stage in encoder.timm.layers:
        for block in stage.blocks:
            for module in {block, block.get_submodule(watched)}:
                module.register_forward_pre_hook(lambda _, inputs: types.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        token = torch.zeros(encoder.mask_token_dim)
        encoder(torch.randn(2, 3, 128, 128), encoder.sample_masking(2), token)
    assert types and set(types) == {torch.float32}


@pytest.mark.parametrize(
    ("size", "ratio", "strategy"),
    [(224, 0.75, "random"), (224, 0.5, "random"), (448, 0.75, "random"), (448, 0.6, "block")]
    + [(672, 0.5, "random"), (672, 0.75, "block")],
)
def test_few_masks_are_drawn_again(size, ratio, strategy):
    encoder = build_encoder("swin_tiny_patch4_window7_224", img_size=size, **NARROW)
    masking = encoder.mask_sampler(ratio, strategy=strategy).sample(1, np.arange(2000))
    assert (masking.packing.redraws > 0).float().mean() < 0.06


def test_where_all_tokens_are_encoded_masks_are_the_plain_ones():
    encoder = build_encoder("swin_tiny_patch4_window7_224", img_size=192, window_size=6, **NARROW)
    masking = encoder.mask_sampler(0.6, encode_masked=True).sample(3, np.arange(1000))
    plain = MaskSampler(encoder.grid, 0.6).sample(3, np.arange(1000))
    assert masking.packing is None and torch.equal(masking.ids_keep, plain.ids_keep)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_a_step_on_a_gpu_agrees_with_the_cpu(name, dtype):
    encoder = build_encoder(name, img_size=128, **({"window_size": 4} if "v2" not in name else {}), **NARROW)
    images, masking = torch.randn(4, 3, 128, 128), encoder.sample_masking(4)
    wanted = encoder(images, masking)
    wanted.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad()
    encoder.cuda()
    pinned = torch.utils.data._utils.pin_memory.pin_memory(masking)
    with torch.autocast("cuda", dtype):
        tokens = encoder(images.cuda(), pinned.to("cuda", non_blocking=True))
    tokens.float().square().mean().backward()
    torch.testing.assert_close(tokens.float().cpu(), wanted, rtol=0.1, atol=0.1)
    for name, parameter in encoder.named_parameters():
        if name in gradients:
            error = (parameter.grad.cpu() - gradients[name]).norm() / gradients[name].norm().clamp_min(1e-6)
            assert error < 0.1, name
