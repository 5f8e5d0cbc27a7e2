"""Step 1 writes each row at its image's index, whatever the order and the batches."""

import pytest
import torch
from torch import Tensor

from deepcluster.clustering.features import extract_features


def describe(images_BCHW: Tensor) -> Tensor:
    return images_BCHW.flatten(1)[:, :5] * 2


IMAGES = torch.rand(30, 3, 2, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("batch_size", [1, 7, 30])
def test_rows_lie_at_the_index_in_any_order(batch_size: int) -> None:
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    batches = [(IMAGES[rows], rows) for rows in order.split(batch_size)]
    features_ND = extract_features(describe, batches, n_images=30, dim=5)
    assert torch.equal(features_ND, describe(IMAGES))
    assert features_ND.dtype == torch.float32


def test_images_that_were_not_seen_are_nan() -> None:
    rows = torch.tensor([12, 3, 29])
    features_ND = extract_features(describe, [(IMAGES[rows], rows)], n_images=30, dim=5)
    assert features_ND[rows].isfinite().all()
    assert features_ND.isnan().all(dim=1).sum() == 27
    assert extract_features(describe, [], n_images=4, dim=5).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float64])
def test_rows_are_kept_in_the_type_that_is_asked_for(dtype: torch.dtype, given: torch.dtype) -> None:
    batches = [(IMAGES, torch.arange(30))]
    features_ND = extract_features(lambda x: describe(x).to(given), batches, n_images=30, dim=5, dtype=dtype)
    assert features_ND.dtype == dtype
    torch.testing.assert_close(features_ND.float(), describe(IMAGES), atol=0.01, rtol=0)


def test_no_gradient_is_kept() -> None:
    weights = torch.ones(12, 5, requires_grad=True)
    features_ND = extract_features(lambda x: x.flatten(1) @ weights, [(IMAGES, torch.arange(30))], n_images=30, dim=5)
    assert not features_ND.requires_grad
