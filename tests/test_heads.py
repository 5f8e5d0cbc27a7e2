"""The cluster head: weights that the seed alone decides, ReLU first."""

import pytest
import torch

from deepcluster.models.heads import ClusterHead


def test_weights_are_normal_with_deviation_a_hundredth_and_biases_zero() -> None:
    head = ClusterHead(512, 300, seed=0)
    weight = head.linear.weight.detach()
    assert weight.shape == (300, 512)
    assert abs(float(weight.mean())) < 5 * 0.01 / weight.numel() ** 0.5
    assert float(weight.std()) == pytest.approx(0.01, rel=0.01)
    # Normal, not uniform: 4.55 % lie beyond two deviations.
    assert float((weight.abs() > 0.02).double().mean()) == pytest.approx(0.0455, abs=0.003)
    assert torch.equal(head.linear.bias, torch.zeros(300))


def test_the_seed_alone_decides_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one = ClusterHead(16, 8, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    assert torch.equal(ClusterHead(16, 8, seed=5).linear.weight, one.linear.weight)
    assert not torch.equal(ClusterHead(16, 8, seed=6).linear.weight, one.linear.weight)


def test_relu_comes_first() -> None:
    head = ClusterHead(16, 8, seed=0)
    features_BD = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    expected_BK = features_BD.clamp(min=0) @ head.linear.weight.T + head.linear.bias
    torch.testing.assert_close(head(features_BD), expected_BK)
    assert torch.equal(head(-features_BD.abs()), torch.zeros(5, 8))


def test_features_are_not_changed_and_all_weights_learn() -> None:
    head = ClusterHead(16, 8, seed=0)
    features_BD = torch.randn(5, 16)
    before_BD = features_BD.clone()
    head(features_BD).square().sum().backward()
    assert torch.equal(features_BD, before_BD)
    assert [name for name, weights in head.named_parameters() if weights.grad is not None] == [
        "linear.weight",
        "linear.bias",
    ]
