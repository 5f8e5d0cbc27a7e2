"""The ascent: pictures of several filters of a stage at once, each on its own.

B pictures, C channels, H and W pixels. No picture depends on which others are with it, nor on their number, up to rounding:
it has its own start, its own gradient and its own length of step, and the jitter of a step is the same for all.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import cos, sin
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

from deepcluster.core.errors import InputError
from deepcluster.visualization.filters.parametrisation import Pixels, Waves, blur, generator_of
from deepcluster.visualization.filters.responses import Responses, mean_scores, own, own_means
from deepcluster.visualization.filters.settings import PUBLISHED, Settings

# Largest jitter: a share of the side, radians, and a share of the scale.
SHIFT, TURN, ZOOM = 1 / 16, 0.1, 0.1


class Ascent(ABC):
    """Pictures of several filters, which `advance` makes better.

    Attributes:
        channels: own filter of each picture.
        done: steps so far.
        parameters: of the pictures, (B, …).
    """

    def __init__(self, responses: Responses, settings: Settings, channels: Sequence[int], form: Pixels | Waves) -> None:
        self.responses, self.settings, self.channels, self.form = responses, settings, tuple(channels), form
        self.done = 0
        starts = [generator_of("start", settings.seed, responses.stage, channel) for channel in self.channels]
        self.parameters = form.start(starts).to(responses.machine.device)

    @abstractmethod
    def advance(self) -> None:
        """One step."""

    def state(self) -> dict[str, Any]:
        """Tensors and plain values from which the ascent goes on, bit for bit."""
        return {"channels": list(self.channels), "done": self.done, "parameters": self.parameters.detach().cpu()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state of an ascent of the same filters and settings.

        Raises:
            InputError: it is of another ascent.
        """
        if tuple(state["channels"]) != self.channels or state["parameters"].shape != self.parameters.shape:
            raise InputError("the state that was kept is of other filters")
        self.done = state["done"]
        self.parameters.data.copy_(state["parameters"])

    def pictures(self) -> NDArray[np.uint8]:
        """What the ascent has found, uint8 (B, H, W, 3)."""
        return self.form.pictures(self.parameters)

    @torch.no_grad()
    def activations(self) -> Tensor:
        """Mean activation (B,) of each picture's own filter over its map, without jitter."""
        return own(self.responses(self.form.inputs(self.parameters)).after_BCHW, self.channels).float().mean(dim=(1, 2))


class PublishedAscent(Ascent):
    """Steps of one length in pixels, up the log-softmax of the own filter among all of its stage (section 4.1).

    Scores are the filters' mean activations; less weight decay times the picture's squared length. Blurred now and then.
    """

    def __init__(self, responses: Responses, settings: Settings, channels: Sequence[int], *, grey: bool) -> None:
        super().__init__(responses, settings, channels, Pixels(settings.image_size, grey=grey))

    def advance(self) -> None:
        decay, sigma, every = self.settings.weight_decay or 0.0, self.settings.sigma or 0.0, self.settings.blur_every or 1
        images_BCHW = self.parameters.requires_grad_()
        scores_BC = mean_scores(self.responses(images_BCHW), self.channels)
        numbers_B = torch.tensor(self.channels, device=scores_BC.device)
        aim = -cross_entropy(scores_BC, numbers_B, reduction="sum") - decay * images_BCHW.square().sum()
        (gradient_BCHW,) = torch.autograd.grad(aim, images_BCHW)
        lengths_B = gradient_BCHW.flatten(1).norm(dim=1)[:, None, None, None]
        with torch.no_grad():
            images_BCHW = images_BCHW + self.settings.lr * gradient_BCHW / (lengths_B + 1e-8)
            self.parameters = blur(images_BCHW, sigma) if self.done % every == 0 else images_BCHW
        self.done += 1


class FourierAscent(Ascent):
    """Adam on the waves of a picture, up the mean activation of its own filter, seen with a little jitter."""

    def __init__(self, responses: Responses, settings: Settings, channels: Sequence[int], *, grey: bool) -> None:
        form = Waves(settings.image_size, grey=grey, device=responses.machine.device)
        super().__init__(responses, settings, channels, form)
        self.parameters.requires_grad_()
        self.adam = torch.optim.Adam([self.parameters], lr=settings.lr)
        self.jitter_S4 = _jitter(settings, responses.stage)

    def advance(self) -> None:
        self.adam.zero_grad()
        images_BCHW = jittered(self.form.inputs(self.parameters), self.jitter_S4[self.done])
        (-own_means(self.responses(images_BCHW), self.channels).sum()).backward()
        self.adam.step()
        self.done += 1

    def state(self) -> dict[str, Any]:
        return {**super().state(), "adam": self.adam.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.adam.load_state_dict(state["adam"])


def _jitter(settings: Settings, stage: str) -> NDArray[np.float64]:
    """For each step: shift down and across in pixels, turn in radians, zoom; a function of seed and stage."""
    most = settings.image_size * SHIFT
    draws_S4 = generator_of("jitter", settings.seed, stage).uniform(-1, 1, (settings.steps, 4))
    return draws_S4 * (most, most, TURN, ZOOM) + (0, 0, 0, 1)


def jittered(images_BCHW: Tensor, jitter_4: NDArray[np.float64]) -> Tensor:
    """Images moved, turned and zoomed a little, all alike.

    What moves out on one side comes in on the other; what a turn or zoom brings in from beyond the edges is mirrored.
    """
    down, across, turn, zoom = map(float, jitter_4)
    moved_BCHW = images_BCHW.roll((round(down), round(across)), dims=(2, 3))
    theta_23 = images_BCHW.new_tensor([[cos(turn) * zoom, -sin(turn) * zoom, 0], [sin(turn) * zoom, cos(turn) * zoom, 0]])
    count, colours, height, width = images_BCHW.shape
    grid_1HW2 = affine_grid(theta_23[None], [1, colours, height, width], align_corners=False)
    grid_BHW2 = grid_1HW2.expand(count, -1, -1, -1)
    return grid_sample(moved_BCHW, grid_BHW2, padding_mode="reflection", align_corners=False)


def new_ascent(responses: Responses, settings: Settings, channels: Sequence[int]) -> Ascent:
    """The ascent of these filters by the objective of the settings."""
    # Sobel trunks see the mean of the colours alone.
    grey = getattr(responses.trunk, "sobel", None) is not None
    kind = PublishedAscent if settings.objective == PUBLISHED else FourierAscent
    return kind(responses, settings, channels, grey=grey)
