"""A trained trunk with what is needed to use it, and the ways to name one.

N images, D features, P components, K clusters.
"""

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepcluster.archs import ARCHITECTURES, LIBRARIES, check_arch
from deepcluster.clustering.assignment import Assignment
from deepcluster.config import Settings
from deepcluster.data.cache import DecodedImages
from deepcluster.data.loader import Loader, usual_workers
from deepcluster.data.sources import ImageSource
from deepcluster.device import Machine
from deepcluster.errors import InputError, did_you_mean
from deepcluster.inference import LOOK_BATCH, image_features
from deepcluster.models.trunk import Trunk
from deepcluster.options import plain
from deepcluster.progress import Reporter
from deepcluster.training.plan import trunk_of
from deepcluster.training.run import RunFolder, load_checkpoint
from deepcluster.training.space import ProjectedSpace, Space, space_of

UNTRAINED = "untrained:"
# Sides of the images that untrained trunks are made for.
USUAL_IMAGE_SIZE = {"alexnet-small": 32, "resnet18-small": 32}


@dataclass(frozen=True)
class Model:
    """A trunk with what is needed to use it.

    Attributes:
        name: what it was loaded from.
        trunk: in eval mode.
        settings: of its run.
        assignment, space: its clusters, and what takes features to where they are; None where it has none.
    """

    name: str
    trunk: Trunk
    settings: Settings
    space: Space | None = None
    assignment: Assignment | None = None

    @property
    def centroids_KP(self) -> Tensor | None:
        """Of its clusters; None where it has none."""
        return None if self.assignment is None else self.assignment.centroids_KP

    def features(
        self,
        source: ImageSource,
        *,
        stage: str | None = None,
        device: str = "auto",
        batch_size: int = 256,
        workers: int | None = None,
        reporter: Reporter | None = None,
    ) -> tuple[Tensor, dict[int, str]]:
        """Rows (N, D), float32, of the images of a source, and the reasons of those that can't be read (rows of NaN)."""
        stage = stage or self.trunk.embed_stage
        self.trunk.check_stage(stage)
        machine = Machine.choose(device, self.settings.precision)
        self.trunk.to(device=machine.device, dtype=machine.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        workers = usual_workers() if workers is None else workers
        reporter = reporter or Reporter(quiet=True)
        images = DecodedImages(source, shorter_side=self.settings.reduce_to or None)
        with (
            closing(Loader(images, workers=workers, device=machine.device)) as loader,
            reporter.track("features", len(source)) as progress,
        ):
            features_ND = image_features(
                self.trunk,
                loader,
                machine,
                stage=stage,
                image_size=self.settings.image_size,
                batch_size=plain(batch_size),
                on_batch=progress,
            )
        return features_ND.float(), loader.unreadable

    def points(self, features_ND: Tensor, *, device: str = "auto") -> Tensor:
        """Points (N, P), float32 on the CPU, of rows of `settings.cluster_stage`, in the space of the clusters.

        Raises:
            InputError: the model has no clusters.
        """
        if self.space is None or self.centroids_KP is None:
            raise InputError(f"{self.name} has no clusters yet: train it for an epoch first")
        if not isinstance(self.space, ProjectedSpace):
            return self.space.transform(features_ND)
        machine = Machine.choose(device, self.settings.precision)
        projection = self.space.projection.to(machine.device, machine.dtype).eval()
        space = replace(self.space, projection=projection, machine=machine)
        # As many rows at once as the run took: products of other shapes are rounded otherwise.
        parts = [space.transform(rows_BD) for rows_BD in features_ND.split(LOOK_BATCH) if len(rows_BD)]
        return torch.cat(parts) if parts else torch.empty(0, self.centroids_KP.shape[1])


def load(model: str | Path) -> Model:
    """The model of a run folder, a checkpoint file, or `untrained:ARCH`, the baseline of random weights.

    `untrained:RUN` is the trunk of a run as it was before its first epoch.

    Raises:
        InputError: there is no such model, or the file can't be used.
    """
    if str(model).startswith(UNTRAINED):
        return _untrained(str(model).removeprefix(UNTRAINED))
    path = Path(model)
    if not path.exists():
        raise InputError(f"{path} does not exist: a model is a run folder, a checkpoint file or untrained:ARCH")
    if path.is_dir():
        folder = RunFolder(path)
        folder.read_config()
        path = folder.last
        if not path.is_file():
            raise InputError(f"{folder.path} has no checkpoint yet")
    state = load_checkpoint(path)
    settings = _settings_of(state, path)
    machine = Machine.choose("cpu", settings.precision)
    trunk = trunk_of(settings).to(machine.dtype)
    try:
        trunk.load_state_dict(state["trunk"])
    except RuntimeError as fault:
        raise InputError(
            f"{path} does not hold the weights of {settings.arch}: {str(fault).splitlines()[-1].strip()}"
        ) from None
    groups = state.get("final", state)
    if "assignment" not in groups:
        return Model(str(model), trunk.eval(), settings)
    space = space_of(groups, settings, dim=trunk.dim, machine=machine)
    return Model(str(model), trunk.eval(), settings, space, Assignment.from_state_dict(groups["assignment"]))


def _settings_of(state: dict[str, Any], path: Path) -> Settings:
    try:
        return Settings.from_dict(state["settings"])
    except (KeyError, InputError) as fault:
        raise InputError(f"{path} was written by another version of deepcluster: {fault}") from None


def _untrained(name: str) -> Model:
    if name in ARCHITECTURES or name.startswith(LIBRARIES):
        check_arch(name)
        size = USUAL_IMAGE_SIZE.get(name, 224)
        settings = Settings(arch=name, image_size=size, sobel=name in ("alexnet", "vgg16"))
    elif Path(name).is_dir():
        settings = Settings.from_dict(RunFolder(Path(name)).read_config()["settings"])
    else:
        raise InputError(
            f"{UNTRAINED}{name}: unknown architecture{did_you_mean(name, ARCHITECTURES)}; use one of "
            f"{', '.join(ARCHITECTURES)}, or a run folder for its trunk before training"
        )
    return Model(UNTRAINED + name, trunk_of(settings).eval(), settings)
