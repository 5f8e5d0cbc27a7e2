"""Published weights of torchvision and timm as tensors, and as models."""

import warnings
from typing import Any

from torch import Tensor

from deepcluster.core.device import Machine
from deepcluster.core.errors import InputError
from deepcluster.interop.renaming import usual_names
from deepcluster.interop.weight_files import read_file
from deepcluster.models.archs import TIMM
from deepcluster.models.named import MISFITS, NamedTrunk
from deepcluster.models.pretrained import Published
from deepcluster.models.trunk import Trunk
from deepcluster.models.weights import take_weights
from deepcluster.run.features import make_run_trunk
from deepcluster.run.model import Model
from deepcluster.run.settings import Settings


def model_of(weights: Published) -> Model:
    """Return the model of published weights, on the CPU; they are downloaded if the library's cache lacks them.

    Raises:
        InputError: they can't be downloaded, or do not fit the network.
    """
    settings = Settings.from_dict({**weights.settings(), "precision": "fp32"})
    weights.file()  # Before seconds go into the network.
    trunk = make_run_trunk(settings)
    take_weights(trunk, tensors_of(weights, trunk), name=weights.name)
    machine = Machine.choose("cpu", "fp32")
    return Model(weights.name, trunk.eval(), settings, machine, remark=weights.describe(), trained=False)


def tensors_of(weights: Published, trunk: Trunk) -> dict[str, Tensor]:
    """Return the tensors of published weights for a trunk, under the names of its library. No code in the file is run.

    Raises:
        InputError: they can't be downloaded, or the file is damaged.
    """
    path = weights.file()
    try:
        tensors = read_file(path).tensors
    except InputError as fault:
        raise InputError(f"{weights.name}: {fault}; delete it, and it will be downloaded again") from None
    if trunk.arch.startswith(TIMM) and isinstance(trunk, NamedTrunk):
        return _through_timm(weights, trunk, tensors)
    return usual_names(tensors)


def _through_timm(weights: Published, trunk: NamedTrunk, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what timm makes of the tensors of a file: its names, and positions for the size of these images."""
    import timm

    given: dict[str, Any] = {"pretrained_cfg_overlay": {"state_dict": tensors}, **trunk.options}
    try:
        with warnings.catch_warnings(action="ignore"):
            network = timm.create_model(weights.key, pretrained=True, num_classes=0, **given)
    except MISFITS as fault:
        reason = next(iter(str(fault).splitlines()), type(fault).__name__)
        raise InputError(f"{weights.name}: the weights do not fit {trunk.arch}: {reason}") from fault
    return dict(network.state_dict())
