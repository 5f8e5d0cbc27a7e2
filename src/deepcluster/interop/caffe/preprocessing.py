"""The first layers of a Caffe network: from BGR pixels of 0 to 255 to normalised RGB, or to grey and its Sobel edges."""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from deepcluster.interop.caffe.messages import Malformed
from deepcluster.interop.caffe.steps import BATCH_NORM, CONVOLUTION, SCALE, Array, Step, convolution_text
from deepcluster.models.convnets import sobel_layer
from deepcluster.models.statistics import IMAGENET_MEAN, IMAGENET_STD

WHITE = 255
# Relative: weights are stored as float32, and may have been multiplied in it.
_TOLERANCE = 1e-5
Triple: TypeAlias = tuple[float, float, float]
_Matrix: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Preprocessing:
    """How the network normalises RGB images in [0, 1], and whether the Sobel layer follows."""

    sobel: bool
    mean: Triple
    std: Triple


def split_preprocessing(steps: list[Step]) -> tuple[Preprocessing, list[Step]]:
    """Return what the first layers do, and the layers of the network itself.

    Raises:
        Malformed: it is not a normalisation of RGB images with or without Sobel; the message shows what it is.
    """
    matrix, offset = np.eye(3), np.zeros(3)  # For pixels in the order B, G, R.
    for number, step in enumerate(steps):
        affine = _affine(step, len(matrix))
        if affine is None:
            rest = steps[number:]
            if step.kind == CONVOLUTION and len(matrix) == 1 and step.arrays[0].shape[:2] == (2, 1):
                _check_sobel(step)
                return _grey(matrix, offset), rest[1:]
            return _colour(matrix, offset), rest
        weight, bias = affine
        with np.errstate(all="ignore"):
            matrix, offset = weight @ matrix, weight @ offset + bias
    raise Malformed("it has no convolutions beyond single pixels")


def _affine(step: Step, channels: int) -> tuple[_Matrix, _Matrix] | None:
    """Return matrix and summands of a step that changes each pixel by itself; None for any other step."""
    if step.kind == CONVOLUTION:
        weight, bias = step.arrays
        outputs, inputs = weight.shape[:2]
        if step.text == convolution_text((outputs, channels, 1, 1), 1, 0):
            return weight.reshape(outputs, inputs).astype(np.float64), bias.astype(np.float64)
        if step.text == convolution_text((channels, 1, 1, 1), 1, 0) + f", {channels} groups":
            return np.diag(weight.ravel().astype(np.float64)), bias.astype(np.float64)
        return None
    if step.kind not in (BATCH_NORM, SCALE):
        return None
    arrays = [array.astype(np.float64) for array in step.arrays]
    if step.kind == BATCH_NORM:
        mean, variance, epsilon = arrays
        factors = 1 / np.sqrt(variance + epsilon)
        arrays = [factors, -mean * factors]
    if arrays[0].size not in (1, channels):
        raise Malformed(f"its layer {step.name} scales {arrays[0].size} channels of {channels}")
    factors, summands = (np.broadcast_to(array, channels) for array in arrays)
    return np.diag(factors), summands


def _check_sobel(step: Step) -> None:
    weight, bias = step.arrays
    ours = sobel_layer().get_submodule("1").get_parameter("weight").numpy()
    if (
        step.text != convolution_text(ours.shape, 1, 1)
        or not np.allclose(weight, ours, rtol=0, atol=4 * _TOLERANCE)
        or np.abs(bias).max() > _TOLERANCE
    ):
        found = [np.round(plane, 3).tolist() for plane in weight[:, 0]]
        raise Malformed(f"its layer {step.name} is not the Sobel layer: {step.text}, {found}, bias {bias.tolist()}")


def _grey(matrix: _Matrix, offset: _Matrix) -> Preprocessing:
    """Return the normalisation whose mean over R, G and B the network takes as grey."""
    weights, shift = matrix[0, ::-1], offset[0]
    mean, std = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)
    if _close(weights, 1 / (3 * WHITE * std)) and _close(shift, -np.mean(mean / std)):
        return Preprocessing(True, IMAGENET_MEAN, IMAGENET_STD)
    if not np.isfinite([*weights, shift]).all() or weights.min() <= 0:
        raise _misfit("a grey image", matrix, offset)
    std = 1 / (3 * WHITE * weights)
    # Only the mean of the three quotients is known, and only that matters.
    return Preprocessing(True, _triple(-shift * std), _triple(std))


def _colour(matrix: _Matrix, offset: _Matrix) -> Preprocessing:
    weights = matrix[:, ::-1]
    mean, std = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)
    if matrix.shape == (3, 3) and np.isfinite(weights).all() and np.isfinite(offset).all():
        factors = np.diag(weights)
        if factors.min() > 0 and np.abs(weights - np.diag(factors)).max() <= _TOLERANCE * factors.min():
            if _close(factors, 1 / (WHITE * std)) and _close(offset, -mean / std):
                return Preprocessing(False, IMAGENET_MEAN, IMAGENET_STD)
            return Preprocessing(False, _triple(-offset / (factors * WHITE)), _triple(1 / (factors * WHITE)))
    raise _misfit("an RGB image", matrix, offset)


def _close(found: Array | _Matrix, wanted: Array | _Matrix) -> bool:
    return bool(np.allclose(found, wanted, rtol=_TOLERANCE, atol=0))


def _triple(values: _Matrix) -> Triple:
    first, second, third = (float(value) for value in values)
    return first, second, third


def _misfit(what: str, matrix: _Matrix, offset: _Matrix) -> Malformed:
    rows = "; ".join(
        f"channel {number} = {blue:+.4g} B {green:+.4g} G {red:+.4g} R {shift:+.4g}"
        for number, ((blue, green, red), shift) in enumerate(zip(matrix[:4], offset[:4], strict=True), 1)
    )
    if np.array_equal(matrix, np.eye(3)) and not offset.any():
        rows = "its first layer takes pixels as they are, so that what is to be subtracted from them is unknown"
    return Malformed(f"its first layers don't make {what} of BGR pixels that is normalised per channel: {rows}")
