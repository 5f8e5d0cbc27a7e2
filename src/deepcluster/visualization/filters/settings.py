"""What an ascent is told: the options of a person, with those left out filled in for the objective."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from deepcluster.core.errors import InputError
from deepcluster.core.options import flag
from deepcluster.visualization.options import FilterOptions

PUBLISHED, FOURIER = "published", "fourier"


@dataclass(frozen=True)
class Settings:
    """Of one ascent, whatever the filter.

    Attributes:
        steps: of the ascent.
        lr: published: length of a step, in normalised pixels; fourier: Adam's rate.
        weight_decay: published: weight of the picture's squared length.
        sigma: published: deviation of the blur in pixels.
        blur_every: published: steps from blur to blur.
        seed: of the start, and of the jitter.
        image_size: side of the pictures in pixels.
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
        """Those that the objective has, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


# Published: the script of the paper's release; the paper's section 4.1 names the method (Yosinski et al., arXiv 1506.06579).
USUAL: dict[str, dict[str, Any]] = {
    PUBLISHED: {"steps": 1000, "lr": 3.0, "weight_decay": 1e-5, "sigma": 0.3, "blur_every": 5},
    FOURIER: {"steps": 200, "lr": 0.05},
}


def settings_of(options: FilterOptions, image_size: int) -> Settings:
    """The settings that options mean for a trunk made for images of `image_size` pixels.

    Raises:
        InputError: an option that the objective does not have.
    """
    usual = USUAL[options.objective]
    given: dict[str, Any] = {
        one.name: getattr(options, one.name)
        for one in fields(Settings)
        if one.name not in ("objective", "seed", "image_size")
    }
    for name, value in given.items():
        if value is not None and name not in usual:
            raise InputError(f"{flag(name)}: --objective {options.objective} has no such setting; leave it out")
    chosen: dict[str, Any] = {name: usual.get(name) if value is None else value for name, value in given.items()}
    return Settings(objective=options.objective, seed=options.seed, image_size=options.image_size or image_size, **chosen)
