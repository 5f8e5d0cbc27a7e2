"""Gradient ascent: pictures of several filters of a stage at once, each independent of the others.

B pictures, C channels, S steps, H and W pixels. Up to rounding, no picture depends on the others of its batch: each
has a start, a gradient and a step length of its own, and the jitter of a step is the same for all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import cos, sin
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

from deepcluster.core.errors import InputError
from deepcluster.core.options import flag
from deepcluster.core.work import Advance, no_advance
from deepcluster.visualization.options import FilterOptions
from deepcluster.visualization.parametrisation import Pixels, Waves, blur, generator_of
from deepcluster.visualization.responses import Responses, mean_scores, own_maps, own_means

PUBLISHED, FOURIER = "published", "fourier"
# Published: the script of the paper's release; the paper's section 4.1 names the method (Yosinski et al., arXiv 1506.06579).
DEFAULTS: dict[str, dict[str, Any]] = {
    PUBLISHED: {"steps": 1000, "lr": 3.0, "weight_decay": 1e-5, "sigma": 0.3, "blur_every": 5},
    FOURIER: {"steps": 200, "lr": 0.05, "weight_decay": None, "sigma": None, "blur_every": None},
}
# Largest jitter: a share of the side, radians, and a share of the scale.
SHIFT, TURN, ZOOM = 1 / 16, 0.1, 0.1


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of one gradient ascent, shared by all filters: those of `FilterOptions` that the objective has.

    `lr` is the length of a step in normalised pixels (published), or the learning rate of Adam (fourier).
    """

    objective: str
    steps: int
    lr: float
    weight_decay: float | None
    sigma: float | None
    blur_every: int | None
    seed: int
    image_size: int

    def as_dict(self) -> dict[str, Any]:
        """Return those that the objective has, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def settings_of(options: FilterOptions, image_size: int) -> Settings:
    """Return the settings that the options mean for a trunk made for images of `image_size` pixels.

    Raises:
        InputError: an option that the objective does not have.
    """
    chosen = {}
    for name, default in DEFAULTS[options.objective].items():
        value = getattr(options, name)
        if value is not None and default is None:
            raise InputError(f"{flag(name)}: --objective {options.objective} has no such setting; leave it out")
        chosen[name] = default if value is None else value
    return Settings(objective=options.objective, seed=options.seed, image_size=options.image_size or image_size, **chosen)


class Ascent:
    """Pictures of the filters `channels`, improved step by step: `parameters` (B, …) of the kind `form`."""

    def __init__(self, responses: Responses, settings: Settings, channels: Sequence[int]) -> None:
        self.responses, self.settings, self.channels = responses, settings, tuple(channels)
        # Trunks with Sobel filters see only the mean of the colours.
        grey = getattr(responses.trunk, "sobel", None) is not None
        device, size = responses.machine.device, settings.image_size
        is_published = settings.objective == PUBLISHED
        self.form = Pixels(size, grey=grey) if is_published else Waves(size, grey=grey, device=device)
        starts = [generator_of("start", settings.seed, responses.stage, channel) for channel in self.channels]
        self.parameters = self.form.start(starts).to(device)

    def steps(self) -> Iterator[None]:
        """Take all steps of the objective, one per iteration."""
        return self._published_steps() if self.settings.objective == PUBLISHED else self._fourier_steps()

    def _published_steps(self) -> Iterator[None]:
        """Take steps of one length in pixels, up the log-softmax of the filter among all filters of the stage (section 4.1).

        Scores are mean activations. Weight decay lowers the squared norm of the picture, which is blurred now and then.
        """
        settings = self.settings
        decay, sigma, every = settings.weight_decay or 0.0, settings.sigma or 0.0, settings.blur_every or 1
        channels_B = torch.tensor(self.channels, device=self.parameters.device)
        for step in range(settings.steps):
            images_BCHW = self.parameters.requires_grad_()
            scores_BC = mean_scores(self.responses(images_BCHW), self.channels)
            objective = -cross_entropy(scores_BC, channels_B, reduction="sum") - decay * images_BCHW.square().sum()
            (gradient_BCHW,) = torch.autograd.grad(objective, images_BCHW)
            norm_B = gradient_BCHW.flatten(1).norm(dim=1)[:, None, None, None]
            with torch.no_grad():
                images_BCHW = images_BCHW + settings.lr * gradient_BCHW / (norm_B + 1e-8)
                self.parameters = blur(images_BCHW, sigma) if step % every == 0 else images_BCHW
            yield

    def _fourier_steps(self) -> Iterator[None]:
        """Take steps of Adam on the waves of a picture, up the mean activation of its filter on the jittered picture."""
        self.parameters.requires_grad_()
        adam = torch.optim.Adam([self.parameters], lr=self.settings.lr)
        for jitter_4 in jitter(self.settings, self.responses.stage):
            adam.zero_grad()
            images_BCHW = jittered(self.form.inputs(self.parameters), jitter_4)
            (-own_means(self.responses(images_BCHW), self.channels).sum()).backward()
            adam.step()
            yield

    @torch.no_grad()
    def activations(self) -> Tensor:
        """Return the mean activation (B,) of the filter of each picture over its map, without jitter."""
        maps_BCHW = self.responses(self.form.inputs(self.parameters)).after_BCHW
        return own_maps(maps_BCHW, self.channels).float().mean(dim=(1, 2))


def filter_pictures(
    responses: Responses, settings: Settings, channels: Sequence[int], advance: Advance = no_advance
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Return pictures (B, H, W, 3) that excite filters, optimised in one batch, and the mean activations (B,) on them.

    Args:
        advance: called with B after each step.
    """
    ascent = Ascent(responses, settings, channels)
    for _ in ascent.steps():
        advance(len(channels))
    return ascent.form.pictures(ascent.parameters), ascent.activations().cpu().numpy()


def default_batch_size(responses: Responses) -> int:
    """Return the number of filters whose activations and gradients fit into a little memory, 2 to 256.

    The memory is fixed, not measured, so that batches are reproducible. On a CPU larger batches are no faster, and at 224 px
    conv1 is half as fast (benchmarks/visualization.py).
    """
    memory = 128 << 20 if responses.machine.device.type == "cpu" else 4 << 30
    return min(max(memory // (2 * responses.bytes_per_image), 2), 256)


def jitter(settings: Settings, stage: str) -> NDArray[np.float64]:
    """Return (S, 4): for each step shifts down and across in pixels, rotation in radians, zoom; from seed and stage."""
    largest = settings.image_size * SHIFT
    draws_S4 = generator_of("jitter", settings.seed, stage).uniform(-1, 1, (settings.steps, 4))
    return draws_S4 * (largest, largest, TURN, ZOOM) + (0, 0, 0, 1)


def jittered(images_BCHW: Tensor, jitter_4: NDArray[np.float64]) -> Tensor:
    """Return the images shifted, rotated and zoomed a little, all alike.

    Shifts wrap around; beyond the edges, rotation and zoom see the image reflected.
    """
    down, across, turn, zoom = map(float, jitter_4)
    moved_BCHW = images_BCHW.roll((round(down), round(across)), dims=(2, 3))
    theta_23 = images_BCHW.new_tensor([[cos(turn) * zoom, -sin(turn) * zoom, 0], [sin(turn) * zoom, cos(turn) * zoom, 0]])
    grid_1HW2 = affine_grid(theta_23[None], [1, *images_BCHW.shape[1:]], align_corners=False)
    grid_BHW2 = grid_1HW2.expand(len(images_BCHW), -1, -1, -1)
    return grid_sample(moved_BCHW, grid_BHW2, padding_mode="reflection", align_corners=False)
