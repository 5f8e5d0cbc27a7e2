"""What an ascent changes: pixels, or the waves that a picture is a sum of; and the pictures that are made of them.

B pictures, C colours, H and W pixels, F frequencies along a line (W // 2 + 1).
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.models.trunk import IMAGENET_DEVIATION, IMAGENET_MEAN

# The release's pictures start as pixels of this mean and deviation, of 255, and are shown with this contrast, of 1.
PIXEL_MEAN, PIXEL_DEVIATION = 128.0, 20.0
SHOWN_CONTRAST = 0.1
# Coefficients at the start, small against what a hundred steps of Adam's usual rate add up to: the start is soon forgotten.
WAVE_DEVIATION = 0.05
# Root mean square of the waves' sum, before the sigmoid. Free, pictures of conv1 end as black and white patches with hard
# edges; at 1.5 they are harsher and noisier than at 1, where pixels deviate about as much as those of photos.
CONTRAST = 1.0
# Covariance of red, green and blue (0 to 1) over the pixels of every third training photo of imagenette-mini (1,500 photos,
# each made 64 × 64): its eigenvectors are brightness, blue against orange, and green against purple.
PHOTO_COVARIANCE = ((0.0754, 0.0677, 0.0630), (0.0677, 0.0737, 0.0728), (0.0630, 0.0728, 0.0861))


def generator_of(*facts: object) -> np.random.Generator:
    """Random numbers that are a function of the facts alone."""
    digest = hashlib.sha256("\n".join(map(str, facts)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest))


def photo_colours() -> Tensor:
    """(3, 3): three independent numbers of unit variance → red, green and blue that vary together as in photos.

    The square root U √Λ of the covariance of photos, scaled so that its longest row is 1.
    """
    variances_3, directions_33 = np.linalg.eigh(np.array(PHOTO_COVARIANCE))
    root_33 = directions_33 * np.sqrt(variances_3)
    return torch.from_numpy(root_33 / np.linalg.norm(root_33, axis=1).max()).float()


class Pixels:
    """Pictures as normalised pixels, as the network takes them; there is no bound.

    Args:
        size: side in pixels.
        grey: show them without colours, which the network can't see.
    """

    def __init__(self, size: int, *, grey: bool) -> None:
        self.size, self.grey = size, grey

    def start(self, generators: Sequence[np.random.Generator]) -> Tensor:
        """Parameters (B, 3, H, W), one picture a generator: independent normal pixels."""
        mean_3, deviation_3 = (np.array(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_DEVIATION))
        shape = (3, self.size, self.size)
        pixels = [(PIXEL_MEAN + PIXEL_DEVIATION * one.standard_normal(shape)) / 255 for one in generators]
        return torch.from_numpy(np.stack([(one - mean_3) / deviation_3 for one in pixels])).float()

    def inputs(self, parameters: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W)."""
        return parameters

    def pictures(self, parameters: Tensor) -> NDArray[np.uint8]:
        """uint8 (B, H, W, 3): each around grey, with the contrast of the release."""
        images_BCHW = parameters.detach().float()
        if self.grey:
            images_BCHW = images_BCHW.mean(dim=1, keepdim=True).expand_as(images_BCHW)
        mean_B, deviation_B = images_BCHW.mean(dim=(1, 2, 3), keepdim=True), images_BCHW.std(dim=(1, 2, 3), keepdim=True)
        return as_bytes(0.5 + SHOWN_CONTRAST * (images_BCHW - mean_B) / (deviation_B + 1e-5))


class Waves:
    """Pictures as sums of waves (Olah et al., "Feature Visualization", 2017): steps are alike at all scales and colours.

    Each wave is divided by its frequency, as photos have it, so that a step does not make noise; colours are independent
    directions of those of photos; all pictures have one contrast; a sigmoid keeps pixels between black and white.

    Args:
        size: side in pixels.
        grey: without colours, which the network can't see.
    """

    def __init__(self, size: int, *, grey: bool, device: torch.device) -> None:
        self.size, self.colours = size, 1 if grey else 3
        across_F, down_H = np.fft.rfftfreq(size), np.fft.fftfreq(size)
        frequencies_HF = np.hypot(down_H[:, None], across_F[None])
        scale_HF = 1 / np.maximum(frequencies_HF, 1 / size)
        self.scale_HF = torch.from_numpy(scale_HF).float().to(device)
        self.to_rgb = (torch.ones(3, 1) if grey else photo_colours()).to(device)

    def start(self, generators: Sequence[np.random.Generator]) -> Tensor:
        """Parameters (B, C, H, F, 2), one picture a generator: real and imaginary parts, normal and small."""
        shape = (self.colours, self.size, self.size // 2 + 1, 2)
        return torch.from_numpy(np.stack([WAVE_DEVIATION * one.standard_normal(shape) for one in generators])).float()

    def images(self, parameters: Tensor) -> Tensor:
        """Images (B, 3, H, W) between 0 and 1."""
        spectrum_BCHF = torch.view_as_complex(parameters) * self.scale_HF
        waves_BCHW = torch.fft.irfft2(spectrum_BCHF, s=(self.size, self.size))
        power_B = waves_BCHW.square().mean(dim=(1, 2, 3), keepdim=True)
        waves_BCHW = waves_BCHW * CONTRAST / (power_B + 1e-20).sqrt()
        return torch.einsum("rc,bchw->brhw", self.to_rgb, waves_BCHW).sigmoid()

    def inputs(self, parameters: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W)."""
        images_BCHW = self.images(parameters)
        mean_3, deviation_3 = (
            images_BCHW.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_DEVIATION)
        )
        return (images_BCHW - mean_3) / deviation_3

    def pictures(self, parameters: Tensor) -> NDArray[np.uint8]:
        """uint8 (B, H, W, 3)."""
        return as_bytes(self.images(parameters.detach()))


def as_bytes(images_BCHW: Tensor) -> NDArray[np.uint8]:
    """uint8 (B, H, W, 3) of images between 0 and 1; what lies beyond is cut off."""
    bytes_BCHW = (images_BCHW.clamp(0, 1) * 255).round().to(torch.uint8)
    result: NDArray[np.uint8] = bytes_BCHW.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return result


def random_images(count: int, size: int, *, device: torch.device) -> Tensor:
    """Normalised images (B, 3, H, W) that show nothing: `Waves` with random coefficients; always the same.

    A filter's answer to them is what its answer to a picture is held against.
    """
    waves = Waves(size, grey=False, device=device)
    parameters = waves.start([generator_of("random images", number) for number in range(count)]).to(device)
    return waves.inputs(parameters)


def blur(images_BCHW: Tensor, sigma: float) -> Tensor:
    """Each colour of each image blurred by a Gaussian of `sigma` pixels; edges are mirrored, the last pixel twice.

    As `scipy.ndimage.gaussian_filter` does by default: weights end at four deviations.
    """
    radius = int(4 * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2) if sigma else np.ones(1)
    weights /= weights.sum()
    for dim in (2, 3):
        length = images_BCHW.shape[dim]
        places = [_mirrored(np.arange(length) + offset, length) for offset in offsets]
        images_BCHW = sum(
            (
                float(weight) * images_BCHW.index_select(dim, torch.from_numpy(place).to(images_BCHW.device))
                for weight, place in zip(weights, places, strict=True)
            ),
            start=torch.zeros((), dtype=images_BCHW.dtype, device=images_BCHW.device),
        )
    return images_BCHW


def _mirrored(places: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    places = places % (2 * length)
    return np.where(places < length, places, 2 * length - 1 - places)
