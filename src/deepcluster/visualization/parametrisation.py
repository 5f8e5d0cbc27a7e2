"""Parametrisations of a picture that is optimised: its pixels, or the waves whose sum it is.

B pictures, C colours, H and W pixels, F frequencies along a row (W // 2 + 1).
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.models.statistics import IMAGENET_MEAN, IMAGENET_STD

# In the paper's release, pixels start with this mean and standard deviation (of 255); contrast of the saved pictures (of 1).
PIXEL_MEAN, PIXEL_DEVIATION = 128.0, 20.0
SHOWN_CONTRAST = 0.1
# Standard deviation of the initial coefficients: small, so that a hundred steps of Adam make the start irrelevant.
WAVE_DEVIATION = 0.05
# Root mean square of the sum of waves, before the sigmoid. Without this constraint, pictures of conv1 end as black and white
# patches with hard edges; at 1.5 they are noisier than at 1, where pixels vary about as much as those of photos.
CONTRAST = 1.0
# Covariance of red, green and blue (0 to 1) over the pixels of every third training photo of imagenette-mini (1,500 photos
# resized to 64 × 64): its eigenvectors are brightness, blue against orange, and green against purple.
PHOTO_COVARIANCE = ((0.0754, 0.0677, 0.0630), (0.0677, 0.0737, 0.0728), (0.0630, 0.0728, 0.0861))


def generator_of(*facts: object) -> np.random.Generator:
    """Return a generator of random numbers that depends only on the facts."""
    digest = hashlib.sha256("\n".join(map(str, facts)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest))


def photo_colours() -> Tensor:
    """Return the matrix (3, 3) that turns three independent numbers into red, green and blue that covary as in photos.

    It is the square root U √Λ of the covariance of photos, scaled so that its longest row has norm 1.
    """
    variances_3, directions_33 = np.linalg.eigh(np.array(PHOTO_COVARIANCE))
    root_33 = directions_33 * np.sqrt(variances_3)
    return torch.from_numpy(root_33 / np.linalg.norm(root_33, axis=1).max()).float()


class Pixels:
    """Pictures as normalised pixels, the input of the network; unbounded. If `grey`, they are saved without colours."""

    def __init__(self, size: int, *, grey: bool) -> None:
        self.size, self.grey = size, grey

    def start(self, generators: Sequence[np.random.Generator]) -> Tensor:
        """Return parameters (B, 3, H, W), one picture per generator: independent normal pixels."""
        mean_3, deviation_3 = (np.array(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        shape = (3, self.size, self.size)
        pixels = [(PIXEL_MEAN + PIXEL_DEVIATION * one.standard_normal(shape)) / 255 for one in generators]
        return torch.from_numpy(np.stack([(one - mean_3) / deviation_3 for one in pixels])).float()

    def inputs(self, parameters: Tensor) -> Tensor:
        """Return normalised images (B, 3, H, W)."""
        return parameters

    def pictures(self, parameters: Tensor) -> NDArray[np.uint8]:
        """Return pictures, uint8 (B, H, W, 3), with mean grey and the contrast of the release."""
        images_BCHW = parameters.detach().float()
        if self.grey:
            images_BCHW = images_BCHW.mean(dim=1, keepdim=True).expand_as(images_BCHW)
        mean_B, deviation_B = images_BCHW.mean(dim=(1, 2, 3), keepdim=True), images_BCHW.std(dim=(1, 2, 3), keepdim=True)
        return as_bytes(0.5 + SHOWN_CONTRAST * (images_BCHW - mean_B) / (deviation_B + 1e-5))


class Waves:
    """Pictures as sums of waves (Olah et al., "Feature Visualization", 2017): steps are alike in all scales and colours.

    Amplitudes fall with frequency, as in photos, so that a step does not add noise; colours are decorrelated as in photos,
    or left out (`grey`); all pictures have the same contrast; a sigmoid keeps pixels between black and white.
    """

    def __init__(self, size: int, *, grey: bool, device: torch.device) -> None:
        self.size, self.colours = size, 1 if grey else 3
        frequencies_HF = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
        scale_HF = 1 / np.maximum(frequencies_HF, 1 / size)
        self.scale_HF = torch.from_numpy(scale_HF).float().to(device)
        self.to_rgb = (torch.ones(3, 1) if grey else photo_colours()).to(device)

    def start(self, generators: Sequence[np.random.Generator]) -> Tensor:
        """Return parameters (B, C, H, F, 2), one picture per generator: real and imaginary parts, normal and small."""
        shape = (self.colours, self.size, self.size // 2 + 1, 2)
        return torch.from_numpy(np.stack([WAVE_DEVIATION * one.standard_normal(shape) for one in generators])).float()

    def images(self, parameters: Tensor) -> Tensor:
        """Return images (B, 3, H, W) between 0 and 1."""
        spectrum_BCHF = torch.view_as_complex(parameters) * self.scale_HF
        waves_BCHW = torch.fft.irfft2(spectrum_BCHF, s=(self.size, self.size))
        power_B = waves_BCHW.square().mean(dim=(1, 2, 3), keepdim=True)
        waves_BCHW = waves_BCHW * CONTRAST / (power_B + 1e-20).sqrt()
        return torch.einsum("rc,bchw->brhw", self.to_rgb, waves_BCHW).sigmoid()

    def inputs(self, parameters: Tensor) -> Tensor:
        """Return normalised images (B, 3, H, W)."""
        images = self.images(parameters)
        mean_3, deviation_3 = (images.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        return (images - mean_3) / deviation_3

    def pictures(self, parameters: Tensor) -> NDArray[np.uint8]:
        """Return pictures, uint8 (B, H, W, 3)."""
        return as_bytes(self.images(parameters.detach()))


def as_bytes(images_BCHW: Tensor) -> NDArray[np.uint8]:
    """Return images as uint8 (B, H, W, 3); values beyond 0 and 1 are clipped."""
    bytes_BCHW = (images_BCHW.clamp(0, 1) * 255).round().to(torch.uint8)
    return bytes_BCHW.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def random_images(count: int, size: int, *, device: torch.device) -> Tensor:
    """Return normalised images (B, 3, H, W) without content: `Waves` with random coefficients, the same at every call.

    They are the baseline of the activation of a filter on its picture.
    """
    waves = Waves(size, grey=False, device=device)
    parameters = waves.start([generator_of("random images", number) for number in range(count)]).to(device)
    return waves.inputs(parameters)


def blur(images_BCHW: Tensor, sigma: float) -> Tensor:
    """Return the images blurred by a Gaussian of `sigma` pixels; edges are reflected, repeating the last pixel.

    Like `scipy.ndimage.gaussian_filter` with its defaults: the kernel is cut off at four standard deviations.
    """
    radius = int(4 * sigma + 0.5)
    offsets_R = np.arange(-radius, radius + 1)
    weights_R = np.exp(-0.5 * (offsets_R / sigma) ** 2) if sigma else np.ones(1)
    weights_R /= weights_R.sum()
    for dim in (2, 3):
        blurred_BCHW, length = torch.zeros_like(images_BCHW), images_BCHW.shape[dim]
        for offset, weight in zip(offsets_R.tolist(), weights_R.tolist(), strict=True):
            places = torch.arange(offset, offset + length, device=images_BCHW.device) % (2 * length)
            reflected = torch.where(places < length, places, 2 * length - 1 - places)
            blurred_BCHW = blurred_BCHW + weight * images_BCHW.index_select(dim, reflected)
        images_BCHW = blurred_BCHW
    return images_BCHW
