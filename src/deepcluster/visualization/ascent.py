"""Gradient ascent: pictures of several filters of a stage at once, each independent of the others.

B pictures, C channels, S steps, H and W pixels of a picture or a map. Up to rounding, no picture depends on the others of
its batch: each has a start, a gradient and a step length of its own, and the jitter of a step is the same for all.
Activations have a gradient even where the last ReLU of a stage outputs only zeros.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import cos, sin
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

from deepcluster.core.device import Machine
from deepcluster.core.errors import InputError
from deepcluster.core.options import flag
from deepcluster.core.work import Advance, no_advance
from deepcluster.models.trunk import Trunk, normalise
from deepcluster.visualization.options import FilterOptions
from deepcluster.visualization.parametrisation import Pixels, Waves, blur, generator_of

PUBLISHED = "published"
# Published: the script of the paper's release; the paper's section 4.1 names the method (Yosinski et al., arXiv 1506.06579).
DEFAULTS: dict[str, dict[str, Any]] = {
    PUBLISHED: {"steps": 1000, "lr": 3.0, "weight_decay": 1e-5, "sigma": 0.3, "blur_every": 5},
    "fourier": {"steps": 200, "lr": 0.05, "weight_decay": None, "sigma": None, "blur_every": None},
}


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


@dataclass(frozen=True)
class Maps:
    """Activations (B, C, H, W) of a stage, and the input of its last ReLU; None if the stage does not end with a ReLU."""

    after_BCHW: Tensor
    before_BCHW: Tensor | None


class Responses:
    """The filters of one stage.

    Args:
        trunk: a copy used for nothing else: it is put into eval mode, and its weights are frozen.
        size: side of the images in pixels.
        made_for: side of the images that the trunk was made for.

    Attributes:
        last_relu: the ReLU that the stage ends with, or None.
        n_channels: number of filters.
        bytes_per_image: bytes of all activations up to the stage, per image.

    Raises:
        InputError: no such stage, or the trunk can't process images of this size.
    """

    def __init__(self, trunk: Trunk, stage: str, machine: Machine, *, size: int, made_for: int) -> None:
        trunk.check_stage(stage)
        self.trunk, self.stage, self.machine = trunk.eval().requires_grad_(False), stage, machine
        self.last_relu: nn.ReLU | None = None
        self.bytes_per_image = 0
        try:
            self.n_channels = self._inspect(size)
        except (RuntimeError, ZeroDivisionError):
            text = f"--image-size {size}: {trunk.arch} makes no {stage} of images of {size} px"
            raise InputError(f"{text}; it was made for {made_for} px, the default") from None

    @torch.no_grad()
    def _inspect(self, size: int) -> int:
        """Find the last ReLU and count the bytes of the activations of one image; return the number of channels."""
        inputs: list[tuple[nn.ReLU, Tensor]] = []

        def note_input(layer: nn.Module, images: tuple[Tensor]) -> None:
            if isinstance(layer, nn.ReLU):
                inputs.append((layer, images[0].clone()))

        def count_bytes(layer: nn.Module, images: tuple[Tensor], result: Tensor) -> None:
            self.bytes_per_image += result.numel() * result.element_size()

        layers = [layer for layer in self.trunk.modules() if not list(layer.children())]
        hooks: list[Any] = [layer.register_forward_pre_hook(note_input) for layer in layers]
        hooks += [layer.register_forward_hook(count_bytes) for layer in layers]
        image_1CHW = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
        try:
            map_1CHW = self.trunk.stage(normalise(image_1CHW.to(self.machine.device)), self.stage)
        finally:
            for hook in hooks:
                hook.remove()
        # The stage ends with the last ReLU if its map is the result of that, or the average over the positions.
        if inputs and inputs[-1][1].ndim == 4:
            relu_1CHW = inputs[-1][1].relu()
            for one in (relu_1CHW, relu_1CHW.mean(dim=(2, 3), keepdim=True)):
                if map_1CHW.shape == one.shape and torch.allclose(map_1CHW, one):
                    self.last_relu = inputs[-1][0]
        return map_1CHW.shape[1]

    def __call__(self, images_BCHW: Tensor) -> Maps:
        """Return the maps of normalised images."""
        images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
        before: list[Tensor | None] = [None]
        # A stage without a last ReLU leaves this one unused.
        relu = self.last_relu or nn.ReLU()
        hook = relu.register_forward_pre_hook(lambda layer, images: before.append(images[0]))
        in_place, relu.inplace = relu.inplace, False
        try:
            with self.machine.autocast():
                return Maps(self.trunk.stage(images_BCHW, self.stage), before[-1])
        finally:
            relu.inplace = in_place
            hook.remove()

    @torch.no_grad()
    def means(self, images_BCHW: Tensor) -> Tensor:
        """Return the mean activation (B, C) of each filter over its map, float32."""
        return self(images_BCHW).after_BCHW.float().mean(dim=(2, 3))


def mean_scores(maps: Maps, channels: Sequence[int]) -> Tensor:
    """Return the mean (B, C) of each filter over its map; before the ReLU for pictures whose own filter is all zero."""
    scores_BC = maps.after_BCHW.float().mean(dim=(2, 3))
    if maps.before_BCHW is None:
        return scores_BC
    zero_B = own_maps(maps.after_BCHW, channels).detach().flatten(1).amax(dim=1) <= 0
    if not zero_B.any():
        return scores_BC
    return torch.where(zero_B[:, None], maps.before_BCHW.float().mean(dim=(2, 3)), scores_BC)


def own_means(maps: Maps, channels: Sequence[int]) -> Tensor:
    """Return the mean (B,) of each picture's own filter over its map; before the ReLU where the map is all zero."""
    after_BHW = own_maps(maps.after_BCHW, channels).float()
    if maps.before_BCHW is None:
        return after_BHW.mean(dim=(1, 2))
    zero_B = after_BHW.detach().flatten(1).amax(dim=1) <= 0
    before_BHW = own_maps(maps.before_BCHW, channels).float()
    return torch.where(zero_B, before_BHW.mean(dim=(1, 2)), after_BHW.mean(dim=(1, 2)))


def own_maps(maps_BCHW: Tensor, channels: Sequence[int]) -> Tensor:
    """Return the map (B, H, W) of each picture's own filter."""
    return maps_BCHW[range(len(channels)), list(channels)]


class Ascent:
    """Pictures of the filters `channels`, improved step by step: `parameters` (B, …) of the kind `form`."""

    def __init__(self, responses: Responses, settings: Settings, channels: Sequence[int]) -> None:
        self.responses, self.settings, self.channels = responses, settings, tuple(channels)
        # Trunks with Sobel filters see only the mean of the colours.
        grey = getattr(responses.trunk, "sobel", None) is not None
        device, size = responses.machine.device, settings.image_size
        self.form = Pixels(size, grey=grey) if settings.objective == PUBLISHED else Waves(size, grey=grey, device=device)
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

    A step advances by B.
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
    draws_S4 = generator_of("jitter", settings.seed, stage).uniform(-1, 1, (settings.steps, 4))
    return draws_S4 * (settings.image_size / 16, settings.image_size / 16, 0.1, 0.1) + (0, 0, 0, 1)


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
