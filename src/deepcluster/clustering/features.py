"""Step 1: look at every image. A trunk is run over the images; each row is written at the image's index."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def extract_features(
    describe: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    n_images: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Run `describe` over `batches` and return features_ND on the CPU; rows of images that were not seen are NaN.

    Args:
        describe: images_BCHW → features_BD; the trunk in eval mode, without gradients.
        batches: pairs of images_BCHW and their indices_B.
        n_images: N.
        dim: D.
        dtype: of the rows kept; float16 halves the memory of networks that run in half precision.
    """
    features_ND = torch.full((n_images, dim), torch.nan, dtype=dtype)
    with torch.no_grad():
        for images_BCHW, indices_B in batches:
            features_ND[indices_B] = describe(images_BCHW).to("cpu", dtype)
    return features_ND
