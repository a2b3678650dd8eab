"""Partial fine-tuning: what learns, what is computed, and what is put back."""

import copy

import pytest
import timm
import torch
from accelerate import Accelerator
from torch import nn

from quarterlight.finetune.config import FinetuneOptimConfig
from quarterlight.finetune.evaluate import outcomes
from quarterlight.finetune.heads import layer_decay_groups
from quarterlight.finetune.partial import freeze
from quarterlight.ssl.batches import Batch
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.recompute import checkpoint_blocks

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5}
SWIN = {
    "img_size": 64,
    "window_size": 2,
    "embed_dim": 12,
    "depths": (2, 2, 2),
    "num_heads": (1, 2, 3),
    "num_classes": 5,
}
IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vit(**more) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **VIT | {"global_pool": "avg", "drop_path_rate": 0.5} | more)


def swin(name: str = "swin_tiny_patch4_window7_224") -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **SWIN, drop_path_rate=0.5)


def learning(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def below(model: nn.Module, *prefixes: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


MLP = ("blocks.1.norm2.", "blocks.1.mlp.")


@pytest.mark.parametrize(
    ("blocks", "parts"),
    [
        (0, ()),
        (0.5, ("blocks.2.norm2.", "blocks.2.mlp.")),
        (1, ("blocks.2.",)),
        (1.5, ("blocks.2.", *MLP)),
        (2, ("blocks.2.", "blocks.1.")),
        (3, ("",)),
        (None, ("",)),
    ],
)
def test_the_last_blocks_of_a_vit_learn_with_the_norm_and_the_head(blocks: float | None, parts: tuple[str, ...]):
    model = vit()
    said = freeze(model, blocks)
    assert learning(model) == below(model, "fc_norm.", "head.", *parts)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert said == "" if blocks is None else f"last {blocks:g} of 3 blocks" in said and f"{trained:,} of" in said


def test_with_the_class_token_the_final_norm_learns():
    model = vit(global_pool="token")
    freeze(model, 0)
    assert learning(model) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_a_swins_blocks_count_through_the_stages_and_merging_learns_with_the_block_before_it(name: str):
    wanted = {
        0.5: ("layers.2.blocks.1.norm2.", "layers.2.blocks.1.mlp."),
        2: ("layers.2.blocks.",),  # merging comes before these, and stays
        2.5: ("layers.2.", "layers.1.blocks.1.norm2.", "layers.1.blocks.1.mlp."),
        3: ("layers.2.", "layers.1.blocks.1."),
        4: ("layers.2.", "layers.1.blocks."),
        5: ("layers.2.", "layers.1.", "layers.0.blocks.1."),
        6: ("",),
    }
    for blocks, parts in wanted.items():
        model = swin(name)
        freeze(model, blocks)
        assert learning(model) == below(model, "norm.", "head.", *parts), blocks


def test_what_learns_in_a_swin_is_what_lies_above_the_lowest_learning_layer_of_layer_decay():
    model = swin()
    freeze(model, 3)
    scales = {
        p: g["lr_scale"] for g in layer_decay_groups(swin(), FinetuneOptimConfig(layer_decay=0.5)) for p in g["params"]
    }
    by_name = dict(zip(dict(model.named_parameters()), scales.values(), strict=True))
    assert len(by_name) == len(scales)
    groups = layer_decay_groups(model, FinetuneOptimConfig(layer_decay=0.5))
    found = {p for g in groups for p in g["params"]}
    assert found == {p for p in model.parameters() if p.requires_grad}
    assert min(g["lr_scale"] for g in groups) == 0.5**3


def test_a_block_with_scales_of_its_own_learns_them_with_the_mlp():
    model = vit(init_values=0.1)
    freeze(model, 0.5)
    assert "blocks.2.ls2.gamma" in learning(model) and "blocks.2.ls1.gamma" not in learning(model)
    eva = timm.create_model("eva02_tiny_patch14_224", img_size=28, embed_dim=24, depth=2, num_heads=2, num_classes=5)
    freeze(eva, 0.5)
    assert {name.split(".")[0] for name in learning(eva)} == {"blocks", "fc_norm", "head"}


def test_frozen_blocks_keep_nothing_for_a_backward_pass():
    kept: list[torch.Size] = []

    def seen(model: nn.Module) -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
            model(IMAGES).sum().backward()
        return len(kept)

    whole, counts = seen(vit().train()), []
    for blocks in (0, 0.5, 1, 2):
        model = vit().train()
        graphs: list[bool] = []
        for block in model.blocks:
            block.register_forward_hook(lambda _, args, out, graphs=graphs: graphs.append(out.requires_grad))
        freeze(model, blocks)
        counts.append(seen(model))
        assert graphs == [i >= 3 - -(-blocks // 1) for i in range(3)]
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert counts == sorted(counts) and counts[0] < whole / 4 and counts[-1] < whole


def test_frozen_parts_are_deterministic_and_the_others_are_not():
    model = vit(pos_drop_rate=0.5, proj_drop_rate=0.3).train()
    freeze(model, 1.5)
    outputs: list[torch.Tensor] = []
    for part in (model.blocks[0], model.blocks[1].attn, model.blocks[1], model.blocks[2]):
        part.register_forward_hook(lambda _, args, out: outputs.append(out.detach()))
    model(IMAGES)
    first, outputs[:] = outputs.copy(), []
    model(IMAGES)
    same = [torch.equal(a, b) for a, b in zip(first, outputs, strict=True)]
    assert same == [True, True, False, False]
    assert not model.blocks[1].drop_path1.training and model.blocks[1].drop_path2.training


def test_evaluation_leaves_frozen_parts_frozen():
    model = vit().train()
    freeze(model, 1)
    modes = [module.training for module in model.modules()]
    assert 0 < sum(modes) < len(modes)
    pixels = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    batch = Batch(pixels, torch.zeros(4, dtype=torch.int64), None, ["a", "b", "c", "d"], [])

    class Plain(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            assert not any(module.training for module in self.network.modules())
            return self.network(images.permute(0, 3, 1, 2) / 255)

    outcomes([Plain(model)], [batch], Accelerator(cpu=True))
    assert [module.training for module in model.modules()] == modes


def test_the_optimizer_has_no_state_for_frozen_parts_and_recomputing_blocks_changes_nothing():
    gradients = []
    for recompute in (False, True):
        model = vit(drop_path_rate=0.0).train()
        freeze(model, 1.5)
        if recompute:
            checkpoint_blocks(model)
        groups = layer_decay_groups(model, FinetuneOptimConfig())
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
        before = copy.deepcopy(model.state_dict())
        model(IMAGES).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        optimizer.step()
        assert set(optimizer.state) == {p for p in model.parameters() if p.requires_grad}
        moved = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
        assert moved == learning(model)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize(
    ("blocks", "said"), [(0.3, "a multiple of 0.5"), (3.5, "the encoder has 3 blocks"), (12, "12")]
)
def test_a_number_that_cannot_be_is_refused(blocks: float, said: str):
    with pytest.raises(InputError, match=said):
        freeze(vit(), blocks)


def test_a_block_without_an_mlp_of_its_own_cannot_learn_by_halves():
    model = timm.create_model("vit_tiny_patch16_224", **VIT, scale_mlp_norm=False)
    for block in model.blocks:
        del block.mlp
    with pytest.raises(InputError, match="no MLP of its own"):
        freeze(model, 0.5)
