"""timm's hybrids as encoders: equal to timm with nothing masked, blind to hidden pixels, batch norms measured anew."""

import copy
from collections.abc import Iterator

import pytest
import timm
import torch
from timm.layers import HybridEmbed
from torch import Tensor, nn

from quarterlight.ssl.config import DecoderConfig
from quarterlight.ssl.encoder import Encoder
from quarterlight.ssl.encoders import build_encoder
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.hybrid import HybridEncoder, has_batch_norm, with_statistics_of
from quarterlight.ssl.mae import attach_decoder
from quarterlight.ssl.masking import Masking

THIN = {"embed_dim": 24, "depth": 2, "num_heads": 2}
# name, image size, further arguments, unit size, whether its stem has batch norms
HYBRIDS = {
    "stem only": ("vit_tiny_r_s16_p8_224", (64, 96), THIN, 32, False),
    "resnet26d": ("vit_small_resnet26d_224", (32, 64), THIN, 32, True),
    "resnetv2 26": ("vit_small_r26_s32_224", (64, 32), THIN, 32, False),
    "resnetv2 50": ("vit_base_r50_s16_224", (32, 48), THIN, 16, False),
    "convolutions": ("vit_base_mci_224", (32, 48), {"depth": 2}, 16, True),  # no projection: 768 wide as the stem
}
BATCH_NORM = [key for key, value in HYBRIDS.items() if value[4]]
ENCODERS: dict[str, Encoder] = {}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small convolutions by two threads take ten times as long where the cores are shared with others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def encoder_of(variant: str) -> Encoder:
    """Returns an encoder in float64 whose parameters and running statistics are all random; not to be changed."""
    if variant not in ENCODERS:
        name, size, args, *_ = HYBRIDS[variant]
        encoder = build_encoder(name, img_size=size, **args).double()
        generator = torch.Generator().manual_seed(0)
        for parameter in encoder.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        for module in batch_norms(encoder):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
        ENCODERS[variant] = encoder.eval()
    return ENCODERS[variant]


def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def pictures(encoder: Encoder, count: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, *encoder.img_size, generator=generator, dtype=torch.float64)


def hidden_pixels(masking: Masking, encoder: Encoder) -> Tensor:
    """Returns True for every pixel of a hidden unit, [B, 1, H, W]."""
    found = torch.zeros(len(masking.is_masked), 1, *encoder.img_size, dtype=torch.bool)
    unit, wide = encoder.unit_size, encoder.grid[1]
    for b, n in masking.is_masked.nonzero().tolist():
        found[b, :, n // wide * unit : (n // wide + 1) * unit, n % wide * unit : (n % wide + 1) * unit] = True
    return found


@pytest.mark.parametrize("variant", HYBRIDS)
def test_a_unit_is_what_becomes_one_token_of_the_stem(variant):
    name, size, _, unit, _ = HYBRIDS[variant]
    encoder = encoder_of(variant)
    assert isinstance(encoder, HybridEncoder) and isinstance(encoder.timm.patch_embed, HybridEmbed)
    height, width = (size, size) if isinstance(size, int) else size
    assert encoder.unit_size == unit and encoder.img_size == (height, width)
    assert encoder.grid == (height // unit, width // unit) == tuple(encoder.timm.patch_embed.grid_size)


@pytest.mark.parametrize("variant", HYBRIDS)
def test_with_nothing_masked_it_is_timms_forward_features(variant):
    encoder = encoder_of(variant)
    images = pictures(encoder)
    with torch.no_grad():
        tokens, wanted = encoder(images), encoder.timm.forward_features(images)
        torch.testing.assert_close(tokens, wanted, atol=1e-12, rtol=0)
        masking, prefix = encoder.sample_masking(3, 0.0), encoder.num_prefix_tokens
        kept = encoder(images, masking)
    assert tokens.shape == (3, prefix + encoder.num_units, encoder.embed_dim)
    for b in range(3):
        torch.testing.assert_close(kept[b, prefix:], wanted[b, prefix:][masking.ids_keep[b]], atol=1e-10, rtol=0)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("variant", HYBRIDS)
def test_nothing_of_a_hidden_pixel_reaches_the_output(variant, training):
    encoder = copy.deepcopy(encoder_of(variant)).train(training)
    masking, images = encoder.sample_masking(3, 0.5, seed=1), pictures(encoder)
    noise = 1 + 100 * torch.randn(images.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    hidden = hidden_pixels(masking, encoder)
    disturbed = torch.where(hidden, images * noise, images)
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    found = []
    with torch.no_grad():
        for x in (images, disturbed):
            encoder.load_state_dict(before, strict=False)
            found.append((encoder(x, masking), {name: buffer.clone() for name, buffer in encoder.named_buffers()}))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in before)  # nor the running statistics
    with torch.no_grad():
        visible = encoder(torch.where(hidden, images, images * noise), masking)
    assert (visible - found[0][0]).abs().max() > 1e-3


@pytest.mark.parametrize("variant", HYBRIDS)
def test_masked_it_is_timm_on_blackened_images_with_the_tokens_dropped(variant):
    encoder = encoder_of(variant)
    masking, images, vit = encoder.sample_masking(3, 0.5), pictures(encoder), encoder.timm
    prefix = encoder.num_prefix_tokens
    blackened = images.clone()
    blackened[hidden_pixels(masking, encoder).expand_as(images)] = 0
    with torch.no_grad():
        tokens = encoder(images, masking)
        x = vit._pos_embed(vit.patch_embed(blackened))
        kept = [torch.cat([x[b, :prefix], x[b, prefix:][masking.ids_keep[b]]]) for b in range(3)]
        wanted = vit.norm(vit.blocks(vit.norm_pre(torch.stack(kept))))
    torch.testing.assert_close(tokens, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("variant", HYBRIDS)
def test_images_are_not_changed_in_place(variant):
    encoder = encoder_of(variant)
    images = pictures(encoder)
    before = images.clone()
    with torch.no_grad():
        encoder(images, encoder.sample_masking(3, 0.5))
    assert torch.equal(images, before)


@pytest.mark.parametrize("variant", HYBRIDS)
def test_state_dict_is_timms_and_every_trainable_parameter_gets_a_gradient(variant):
    name, size, args, *_ = HYBRIDS[variant]
    encoder = copy.deepcopy(encoder_of(variant)).float().train()
    model = timm.create_model(name, num_classes=0, img_size=size, **args)
    model.load_state_dict(encoder.timm.state_dict(), strict=True)
    decoder = DecoderConfig(embed_dim=16, depth=1, num_heads=2)
    autoencoder = attach_decoder(encoder, in_chans=3, decoder=decoder, target="norm_pix")
    images = pictures(encoder, 4).float()
    result = autoencoder(images, encoder.sample_masking(4, 0.5), only_scored=True)
    result.loss.backward()
    trained = {name: p for name, p in autoencoder.named_parameters() if p.requires_grad}
    assert any("patch_embed.backbone" in name for name in trained)
    assert not [name for name, p in trained.items() if p.grad is None or not p.grad.isfinite().all()]
    assert result.prediction.shape == (4, encoder.num_units // 2, 3 * encoder.unit_size**2)


@pytest.mark.parametrize("variant", HYBRIDS)
def test_initial_weights_leave_the_stem_as_timm_makes_it(variant):
    name, size, args, *_ = HYBRIDS[variant]
    encoder = build_encoder(name, img_size=size, **args)
    before = {key: x.clone() for key, x in encoder.timm.patch_embed.backbone.state_dict().items()}
    encoder.init_weights()
    after = encoder.timm.patch_embed.backbone.state_dict()
    assert all(torch.equal(after[key], x) for key, x in before.items())
    assert not encoder.timm.blocks[0].attn.qkv.bias.any() and encoder.timm.pos_embed[0, 1:].abs().max() > 0.9


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("vit_tiny_r_s16_p8_224", 80, "32.*use 64 or 96"),
        ("vit_small_r26_s32_224", (64, 80), "32.*use 64 or 96"),
        ("vit_small_resnet26d_224", 100, "32.*use 96 or 128"),
        ("vit_small_r26_s32_224", 240, "32.*use 224 or 256"),
        ("vit_small_resnet50d_s16_224", 225, "16.*use 224 or 240"),
        ("vit_base_mci_224", (40, 32), "16.*use 32 or 48"),
    ],
)
def test_sizes_that_units_do_not_tile_are_refused_with_those_that_work(name, size, said):
    with pytest.raises(InputError, match=said):
        build_encoder(name, img_size=size, depth=1)


def test_a_mask_unit_of_two_hybrid_units_is_hidden_as_a_whole():
    encoder = encoder_of("convolutions")
    with pytest.raises(InputError, match="mask.unit 32 does not divide the image of 32 x 48 pixels: use one of 16$"):
        encoder.mask_sampler(0.5, mask_unit=32)
    sampler = build_encoder("vit_base_mci_224", img_size=64, depth=1).mask_sampler(0.75, mask_unit=32)
    assert sampler.block == 2 and sampler.num_keep == 4


# --- batch norms


@pytest.mark.parametrize("variant", HYBRIDS)
def test_which_hybrids_have_batch_norms(variant):
    encoder = encoder_of(variant)
    assert has_batch_norm(encoder.timm) == HYBRIDS[variant][4] == bool(batch_norms(encoder))


def test_a_hybrid_without_batch_norms_has_no_statistics_to_change():
    encoder = encoder_of("stem only")
    again = with_statistics_of(encoder.timm, [pictures(encoder)])
    before, after = encoder.timm.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize(
    ("variant", "training"), [("resnet26d", False), ("convolutions", True), ("convolutions", False)]
)
def test_statistics_are_the_averages_over_the_given_images(variant, training):
    model = copy.deepcopy(encoder_of(variant)).timm.train(training)
    encoder = encoder_of(variant)
    batches = [pictures(encoder, 3, seed) for seed in range(3)]
    # What every batch norm gets when each normalizes by its batch, and what plain torch says of it.
    seen: dict[str, list[Tensor]] = {}
    probe = copy.deepcopy(model).train()
    for name, module in probe.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(
                lambda module, args, output, name=name: seen.setdefault(name, []).append(args[0].transpose(0, 1))
            )
    with torch.no_grad():
        for images in batches:
            probe.patch_embed(images)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    momenta = [module.momentum for module in batch_norms(model)]
    measured = with_statistics_of(model, iter(batches))
    assert len(seen) == len(batch_norms(measured)) > 0
    for name, inputs in seen.items():
        module = measured.get_submodule(name)
        assert isinstance(module, nn.BatchNorm2d) and len(inputs) == 3
        mean = torch.stack([x.flatten(1).mean(dim=1) for x in inputs]).mean(dim=0)
        var = torch.stack([x.flatten(1).var(dim=1) for x in inputs]).mean(dim=0)
        torch.testing.assert_close(module.running_mean, mean, atol=1e-10, rtol=0)
        torch.testing.assert_close(module.running_var, var, atol=1e-10, rtol=1e-10)
        assert module.num_batches_tracked == 3
    # The model that was given is as it was; the copy differs in nothing but the statistics.
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)
    assert [module.training for module in model.modules()] == modes
    assert [module.training for module in measured.modules()] == modes
    assert [module.momentum for module in batch_norms(model)] == momenta
    assert [module.momentum for module in batch_norms(measured)] == momenta
    changed = {key for key, x in measured.state_dict().items() if not torch.equal(x, before[key])}
    assert changed == {f"{name}.{what}" for name in seen for what in STATISTICS}


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize("variant", BATCH_NORM)
def test_one_batch_gives_in_eval_mode_what_it_gave_in_train_mode(variant):
    encoder = encoder_of(variant)
    images = pictures(encoder, 6)
    measured = with_statistics_of(encoder.timm, [images]).eval()
    in_training = copy.deepcopy(measured).train()
    with torch.no_grad():
        found, wanted = (model.patch_embed(images) for model in (measured, in_training))
        stale = encoder.timm.patch_embed(images)
    scale = wanted.abs().mean()
    assert (found - wanted).abs().mean() < 0.1 * scale  # but for the unbiased variance
    assert (found - wanted).abs().mean() < 0.5 * (stale - wanted).abs().mean()
