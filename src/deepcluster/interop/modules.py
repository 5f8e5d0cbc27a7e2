"""A module in memory as a model."""

import warnings
from copy import deepcopy
from typing import Any

from torch import nn

from deepcluster.core.device import Machine
from deepcluster.core.errors import InputError
from deepcluster.models.archs import custom_name
from deepcluster.models.custom import CustomTrunk
from deepcluster.models.pretrained import timm_form
from deepcluster.run.model import FORM, Model
from deepcluster.run.settings import Settings


def model_of_module(module: nn.Module, name: str | None, **form: Any) -> Model:
    """Return the model of a copy of a module, in float32 on the CPU.

    Args:
        name: the class of the module by default.
        form: `image_size`, `mean`, `std`, `interpolation`, `crop_pct`; those left out are taken from `pretrained_cfg`, which
            networks of timm have, and else are the usual ones.

    Raises:
        InputError: name or form can't be used, or the module does not take images and return features.
    """
    arch = custom_name(name or type(module).__name__)
    known = _of_timm(module)
    settings = Settings.from_dict({"arch": arch, "sobel": False, "precision": "fp32", **known, **form})
    try:
        copy = deepcopy(module)
    except (RuntimeError, TypeError) as fault:
        raise InputError(
            f"{arch} can't be copied ({fault}); construct it again, without outputs of its passes in it"
        ) from fault
    trunk = CustomTrunk.of(arch, copy, image_size=settings.image_size)
    trunk.take_statistics(settings.mean, settings.std)
    remark = _remark(trunk, settings)
    assumed = [key for key in ("image_size", "mean", "std") if key not in {**known, **form}]
    if assumed:
        text = f"{arch}: {', '.join(assumed)} not given to load, so the usual values are used; it is for {remark}"
        warnings.warn(text, stacklevel=3)
    return Model(arch, trunk.cpu().eval(), settings, Machine.choose("cpu", "fp32"), remark=remark, trained=False)


def _of_timm(module: nn.Module) -> dict[str, Any]:
    """Return the form of the images that a network of timm declares; nothing of others."""
    config = getattr(module, "pretrained_cfg", None)
    is_whole = (
        isinstance(config, dict)
        and config["input_size"][:1] == (3,)
        and all(config.get(key) for key in ("input_size", *FORM))
    )
    return timm_form(config) if is_whole else {}  # type: ignore[arg-type]


def _remark(trunk: CustomTrunk, settings: Settings) -> str:
    """Say how many features there are, and of which images."""
    mean, std = (", ".join(f"{one:g}" for one in values) for values in (settings.mean, settings.std))
    view = f"{settings.interpolation}, {100 * settings.crop_pct:.4g} % of the side"
    return f"{trunk.dim:,} features; images of {settings.image_size} px, {view}, mean {mean}, std {std}"
