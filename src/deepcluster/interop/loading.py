"""Models from run folders, checkpoints, files of other programs and names of architectures."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from deepcluster.clustering.assignment import Assignment
from deepcluster.core.device import Machine
from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.core.files import load_tensors, user_path
from deepcluster.core.progress import Reporter
from deepcluster.core.retry import end_waits
from deepcluster.core.work import Interruption, Work
from deepcluster.interop.foreign import model_of_file
from deepcluster.interop.modules import model_of_module
from deepcluster.interop.pretrained import model_of
from deepcluster.interop.weight_files import CAFFE_FILES, SAFETENSORS, file_of, has_hub_files, read_file
from deepcluster.models.archs import ARCHITECTURES, CUSTOM, PREFIXES, TIMM, check_arch
from deepcluster.models.pretrained import PRETRAINED, published
from deepcluster.models.weights import Undrawn
from deepcluster.run.auto import PAPER_TRUNKS
from deepcluster.run.features import make_run_trunk
from deepcluster.run.folder import RunFolder, checkpoint_of, is_checkpoint
from deepcluster.run.model import Model
from deepcluster.run.settings import Settings
from deepcluster.run.space import space_of

UNTRAINED = "untrained:"
# Side in pixels of the images that untrained trunks are made for, where it is not 224.
USUAL_IMAGE_SIZE = {"resnet-patches": 32, "alexnet-small": 32, "resnet18-small": 32}


def load(
    model: str | Path | nn.Module,
    *,
    name: str | None = None,
    image_size: int | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
) -> Model:
    """Return the model of a run, a checkpoint, another program's file, a name of weights, or a module; on the CPU.

    `untrained:ARCH` has random weights; `untrained:RUN` is the trunk of a run before its first epoch. `ARCH@FILE` names the
    network of a file that does not show it, as in `timm:vit_small_patch16_224@weights.pth`. `ARCH@pretrained` has weights
    that torchvision or timm publishes, from its cache, or downloaded into it (`models.pretrained`).

    A `torch.nn.Module` is copied. It takes normalised images (B, 3, H, W), and returns features (B, D), or a map
    (B, C, H, W), of which the average is the features.

    Args:
        name: of a module: it becomes `custom:NAME`; its class by default.
        image_size, mean, std, interpolation, crop_pct: of the images of a module, as in `Settings`. Networks of timm declare
            them; otherwise those left out are 224 px, ImageNet's mean and deviation, "bilinear" and 0.875.

    Raises:
        InputError: there is no such model, or the file can't be used.
    """
    given = {"image_size": image_size, "mean": mean, "std": std, "interpolation": interpolation, "crop_pct": crop_pct}
    form = {key: value for key, value in given.items() if value is not None}
    if isinstance(model, nn.Module):
        return model_of_module(model, name, **form)
    if callable(model):
        raise InputError(f"{model!r} is no module yet, but what makes one: give its result")
    if name is not None or form:
        named = ", ".join(key for key, value in {"name": name, **given}.items() if value is not None)
        raise InputError(f"{named}: for a torch.nn.Module only, and {model} has its own; leave it out")
    if str(model).startswith(UNTRAINED):
        return _untrained(str(model))
    arch, path = arch_and_path(str(model))
    if not path.exists():
        weights = published(str(model))
        if weights is not None:
            return model_of(weights)
        raise InputError(_no_model(str(model), arch, path))
    if path.is_dir() and not has_hub_files(path):
        folder = RunFolder(path)
        folder.read_config()
        path = folder.last
        if not path.is_file():
            raise InputError(f"{folder.path} has no checkpoint yet")
    if path.is_dir() or path.suffix in (SAFETENSORS, *CAFFE_FILES):
        return model_of_file(read_file(path), name=str(model), arch=arch)
    state = load_tensors(path)
    if arch is None and is_checkpoint(state):
        return model_of_checkpoint(checkpoint_of(state, path), path, name=str(model))
    return model_of_file(file_of(state, path), name=str(model), arch=arch)


def _untrained(model: str) -> Model:
    """Return the model of `untrained:ARCH` or `untrained:RUN`."""
    name = model.removeprefix(UNTRAINED)
    if name in ARCHITECTURES or name.startswith(PREFIXES):
        check_arch(name)
        settings = Settings(arch=name, image_size=USUAL_IMAGE_SIZE.get(name, 224), sobel=name in PAPER_TRUNKS)
    elif Path(name).is_dir():
        folder = RunFolder(Path(name))
        settings, path = Settings.from_saved(folder.read_config()["settings"]), folder.epoch_checkpoint(0)
        if path.is_file():  # Its weights depend on the images.
            return replace(model_of_checkpoint(checkpoint_of(load_tensors(path), path), path, name=model), trained=False)
    else:
        raise InputError(
            f"{model}: unknown architecture{did_you_mean(name, ARCHITECTURES)}; use one of "
            f"{', '.join(ARCHITECTURES)}, torchvision:NAME, timm:NAME, or a run folder for its trunk before training"
        )
    machine = Machine.choose("cpu", settings.precision)
    return Model(model, make_run_trunk(settings).eval(), settings, machine, trained=False)


def _no_model(model: str, arch: str | None, path: Path) -> str:
    """Return what is wrong with a name of neither a file nor weights, and what to write."""
    if arch is not None:
        tagged = arch.startswith(TIMM) and "." not in arch and path.name == str(path)
        advice = f"; if that is a tag of timm, write {arch}.{path}@{PRETRAINED}" if tagged else ""
        near = did_you_mean(str(path), [PRETRAINED])
        return f"{model}: the file {path} does not exist{near}; for published weights write {arch}@{PRETRAINED}{advice}"
    if model in ARCHITECTURES or model.startswith(PREFIXES):
        published = "" if model.startswith(CUSTOM) else f"{model}@{PRETRAINED} for published weights, "
        return f"{model} names a network, and not its weights: write {published}{model}@FILE, or {UNTRAINED}{model}"
    return (
        f"{path} does not exist: a model is a run folder, a checkpoint file, another program's file of weights, "
        "untrained:ARCH, or published weights, such as torchvision:resnet50@pretrained or timm:NAME@pretrained"
    )


def arch_and_path(model: str) -> tuple[str | None, Path]:
    """Return the network and the rest of `ARCH@FILE` or `ARCH@pretrained`; no network where a file has that name."""
    arch, at, file = model.partition("@")
    if at and not user_path(model).exists() and (arch in ARCHITECTURES or arch.startswith(PREFIXES)):
        check_arch(arch)
        return arch, user_path(file)
    return None, user_path(model)


def model_of_checkpoint(state: dict[str, Any], path: Path, *, name: str) -> Model:
    """Return the model that a checkpoint holds, on the CPU.

    Raises:
        InputError: the checkpoint can't be used.
    """
    if "table" in state:
        raise InputError(
            f"{name} has clusters of a table of embeddings ({state['table']}), and no network: assign takes another table "
            "of such embeddings; report, info, and cluster with another --clusters work, too"
        )
    try:
        settings = Settings.from_saved(state["settings"])
    except (KeyError, InputError) as fault:
        raise InputError(f"{path} was written by another version of deepcluster: {fault}") from None
    machine = Machine.choose("cpu", settings.precision)
    with Undrawn():  # All weights are those of the checkpoint.
        trunk = make_run_trunk(settings).to(machine.dtype)
    try:
        trunk.load_state_dict(state["trunk"])
    except RuntimeError as fault:
        reason = str(fault).splitlines()[-1].strip()
        raise InputError(f"{path} does not hold the weights of {settings.arch}: {reason}") from None
    clusters, trained = state.get("final", state), not state.get("imported", False)
    if "assignment" not in clusters:
        return Model(name, trunk.eval(), settings, machine, trained=trained)
    space = space_of(clusters, settings, dim=trunk.dim, machine=machine)
    assignment = Assignment.from_state_dict(clusters["assignment"])
    return Model(name, trunk.eval(), settings, machine, space, assignment, trained=trained)


def loaded(
    model: str | Path | Model,
    *,
    device: str = "auto",
    workers: int | None = None,
    reporter: Reporter | None = None,
    interruption: Interruption | None = None,
    work: Work | None = None,
) -> Model:
    """Return a model on a device as evaluation and visualization use it: a run of fp64 is applied in fp32."""
    model = model if isinstance(model, Model) else load(model)
    precision = "fp32" if model.settings.precision == "fp64" else model.settings.precision
    work = work or Work(reporter, interruption or new_interruption())
    if model.remark:
        work.reporter.say(f"{model.name}: {model.remark}")
    return model.on(device, precision=precision, workers=workers, work=work)


def new_interruption(advice: str = "the state is saved: the same command continues from here") -> Interruption:
    """Return the request to stop for long work; `advice`: what was kept and how to continue."""
    return Interruption(on_request=end_waits, advice=advice)
