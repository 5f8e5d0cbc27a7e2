"""What every trunk keeps, whoever made the network: a class of tests that each file of trunks inherits."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from deepcluster.core.errors import InputError
from deepcluster.models.archs import make_trunk
from deepcluster.models.trunk import FEATURES, Trunk


def size_of(arch: str) -> int:
    """A size that makes the tests quick."""
    return {"alexnet": 64}.get(arch, 32)


@cache
def trunk_of(arch: str, sobel: bool = True) -> Trunk:
    """In eval mode; BatchNorm's averages are not those of a new network, so that it does something."""
    trunk = make_trunk(arch, image_size=size_of(arch), sobel=sobel, seed=3).eval()
    generator = torch.Generator().manual_seed(0)
    for layer in trunk.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(std=0.1, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
    return trunk


def images(size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


class TrunkContract:
    """Inherit, and parametrize by `arch`."""

    @pytest.mark.parametrize("sobel", [True, False])
    def test_features_have_the_width_declared(self, arch: str, sobel: bool) -> None:
        with torch.no_grad():
            features_BD = trunk_of(arch, sobel)(images(size_of(arch)))
        assert features_BD.shape == (2, trunk_of(arch, sobel).dim)
        assert features_BD.isfinite().all()
        assert not torch.equal(features_BD[0], features_BD[1])

    def test_stages_are_maps_and_vectors_their_averages(self, arch: str) -> None:
        trunk, x = trunk_of(arch), images(size_of(arch))
        assert trunk.arch == arch
        assert trunk.stages[-1] == FEATURES
        trunk.check_stage(trunk.embed_stage)
        assert trunk.vectors(x, trunk.embed_stage).dim() == 2
        side = size_of(arch) + 2  # Paddings and borders.
        with torch.no_grad():
            for name in trunk.stages:
                maps_BCHW = trunk.stage(x, name)
                assert maps_BCHW.dim() == 4
                assert len(maps_BCHW) == 2
                assert maps_BCHW.shape[2] == maps_BCHW.shape[3] <= side
                side = maps_BCHW.shape[2]
                if name == trunk.embed_stage:
                    torch.testing.assert_close(trunk.vectors(x, name), maps_BCHW.mean(dim=(2, 3)))

    def test_several_stages_equal_single_ones(self, arch: str) -> None:
        """In the network's order, whatever the order of asking; no stage writes into the one before."""
        trunk, x = trunk_of(arch), images(size_of(arch))
        with torch.no_grad():
            walked = dict(trunk.walk(x))
            assert tuple(walked) == trunk.stages
            for name in trunk.stages:
                assert torch.equal(trunk.stage(x, name), walked[name])
            last_and_first = (trunk.stages[-2], trunk.stages[0])
            two = trunk.maps(x, last_and_first)
        assert tuple(two) == last_and_first[::-1]
        assert all(torch.equal(two[name], walked[name]) for name in two)

    def test_the_last_stage_is_forward(self, arch: str) -> None:
        trunk, x = trunk_of(arch), images(size_of(arch))
        with torch.no_grad():
            assert torch.equal(trunk.stage(x, FEATURES)[:, :, 0, 0], trunk(x))
            assert torch.equal(trunk.vectors(x, FEATURES), trunk(x))

    def test_an_unknown_stage_is_reported_with_the_nearest(self, arch: str) -> None:
        trunk = trunk_of(arch)
        first = trunk.stages[0]
        for ask in (trunk.stage, trunk.vectors):
            with pytest.raises(InputError, match=rf"{first}x.*did you mean {first}\?"):
                ask(images(size_of(arch)), f"{first}x")
        with pytest.raises(InputError, match=", ".join(trunk.stages)):
            trunk.check_stage("")

    def test_eval_mode_is_deterministic_and_leaves_the_images(self, arch: str) -> None:
        trunk, x = trunk_of(arch, False), images(size_of(arch))
        before = x.clone()
        with torch.no_grad():
            once = trunk(x)
            torch.manual_seed(8)
            assert torch.equal(trunk(x), once)
            trunk.stage(x, trunk.stages[0])
        assert torch.equal(x, before)

    def test_only_the_seed_fixes_the_weights(self, arch: str) -> None:
        torch.manual_seed(11)
        state = torch.get_rng_state()
        one, two, other = (make_trunk(arch, image_size=size_of(arch), seed=seed).state_dict() for seed in (5, 5, 6))
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(one[name], two[name]) for name in one)
        # Biases, BatchNorm and Sobel start as constants, and so do scales: every other weight differs.
        drawn = [name for name in one if one[name].dim() > 1 and one[name].std() > 0 and not name.startswith("sobel")]
        assert len(drawn) >= 5
        assert not any(torch.equal(one[name], other[name]) for name in drawn)

    def test_weights_survive_a_state_dict(self, arch: str) -> None:
        trunk, x = trunk_of(arch), images(size_of(arch))
        other = make_trunk(arch, image_size=size_of(arch), seed=9).eval()
        with torch.no_grad():
            assert not torch.equal(other(x), trunk(x))
            other.load_state_dict(trunk.state_dict(), strict=True)
            assert torch.equal(other(x), trunk(x))

    def test_channels_last_gives_the_same(self, arch: str) -> None:
        x = images(size_of(arch))
        trunk = trunk_of(arch)
        with torch.no_grad():
            expected = trunk(x)
            features_BD = trunk.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
            trunk.to(memory_format=torch.contiguous_format)
        torch.testing.assert_close(features_BD, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)

    def test_bfloat16_is_near(self, arch: str) -> None:
        trunk, x = trunk_of(arch), images(size_of(arch))
        with torch.no_grad():
            expected = trunk(x)
            with torch.autocast("cpu", torch.bfloat16):
                features_BD = trunk(x).float()
        assert float((features_BD - expected).norm() / expected.norm()) < 0.1

    def test_everything_learns_but_sobel(self, arch: str) -> None:
        trunk = make_trunk(arch, image_size=size_of(arch), sobel=True, dropout=0.0)
        trunk.train()
        trunk(images(size_of(arch), batch=4)).square().mean().backward()
        without = [name for name, weights in trunk.named_parameters() if weights.grad is None]
        assert without == ["sobel.0.weight", "sobel.0.bias", "sobel.1.weight", "sobel.1.bias"]
        assert not any(weights.requires_grad for name, weights in trunk.named_parameters() if name in without)
