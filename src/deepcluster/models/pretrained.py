"""Published weights of torchvision and timm by name: the images that they are for, and their file in the library's cache.

`ARCH@pretrained` are the library's usual weights of a network, `timm:NAME.TAG@pretrained` those that a tag names, and
`torchvision:NAME@WEIGHTS` those of an entry of torchvision's list (`IMAGENET1K_V2`).
"""

import re
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import Any

import torch

from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.models.archs import ARCHITECTURES, PREFIXES, TIMM, TORCHVISION
from deepcluster.models.named import name_and_options

PRETRAINED = "pretrained"
# Our networks that torchvision has as well, under its names.
IN_TORCHVISION = {"resnet18": "resnet18", "resnet50": "resnet50", "vgg16": "vgg16_bn"}
NOT_STATED = "licence not stated"
# Networks of torchvision that go from ImageNet's statistics to these inside, where they have published weights.
_OWN_STATISTICS = {"googlenet": (0.5, 0.5, 0.5), "inception_v3": (0.5, 0.5, 0.5)}
_TORCHVISION_WEIGHTS = re.compile(r"[A-Z][A-Z0-9_]*")
# A server that says nothing for so long is not there.
_SECONDS = 15.0


@dataclass(frozen=True)
class Published:
    """Weights that a library publishes, and the images that they are for.

    Attributes:
        name: as the user wrote it.
        arch: the network, for `make_trunk`.
        library, key: "torchvision" or "timm", and its own name of the weights.
        image_size: side S in pixels of the images.
        mean, std: by which images are normalised.
        interpolation: "bilinear" or "bicubic".
        crop_pct: share of the resized image's shorter side that the centre crop shows.
        licence: as the library states it; "" where it does not.
        file: returns the file in the library's cache, which is downloaded if it is not there.
        remark: how the library prepares images otherwise.
    """

    name: str
    arch: str
    library: str
    key: str
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    licence: str
    file: Callable[[], Path]
    remark: str = ""

    def settings(self) -> dict[str, Any]:
        """Return the settings of a run that these weights fix."""
        own = ("image_size", "mean", "std", "interpolation", "crop_pct")
        return {"arch": self.arch, "sobel": False, **{name: getattr(self, name) for name in own}}

    def describe(self) -> str:
        """Return what they are, their licence, and the images that they are for."""
        licence = f"licence {self.licence}" if self.licence else NOT_STATED
        images = f"images of {self.image_size} px, {self.interpolation}, {100 * self.crop_pct:.4g} % of the side"
        return "; ".join(part for part in (f"{self.library}'s {self.key}, {licence}", images, self.remark) if part)


def published(name: str) -> Published | None:
    """Return the weights that `ARCH@pretrained` or `torchvision:NAME@WEIGHTS` names; None if it is none of these.

    Nothing is downloaded.

    Raises:
        InputError: the library does not know the network, or has no such weights.
    """
    arch, at, weights = name.partition("@")
    if not at or not (arch in ARCHITECTURES or arch.startswith(PREFIXES)):
        return None
    if arch.startswith(TIMM):
        return _of_timm(name, arch) if weights == PRETRAINED else None
    if weights != PRETRAINED and not _TORCHVISION_WEIGHTS.fullmatch(weights):
        return None
    if not arch.startswith(TORCHVISION) and arch not in IN_TORCHVISION:
        own = ", ".join(IN_TORCHVISION)
        raise InputError(f"{arch} has no published weights; use {own}, torchvision:NAME or timm:NAME")
    return _of_torchvision(name, arch, weights)


def _of_torchvision(name: str, arch: str, chosen: str) -> Published:
    import torchvision

    network = name_and_options(arch)[0] if arch.startswith(TORCHVISION) else IN_TORCHVISION[arch]
    known = torchvision.models.list_models(module=torchvision.models)
    if network not in known:
        raise InputError(f"torchvision has no classifier {network!r}{did_you_mean(network, known)}")
    choices: Any = torchvision.models.get_model_weights(network)
    if chosen != PRETRAINED and chosen not in choices.__members__:
        names = [one.name for one in choices]
        raise InputError(f"{name}: torchvision has no such weights{did_you_mean(chosen, names)}; it has {', '.join(names)}")
    entry = choices.DEFAULT if chosen == PRETRAINED else choices[chosen]
    views = entry.transforms()
    size = int(views.crop_size[0])
    return Published(
        name=name,
        arch=arch,
        library="torchvision",
        key=str(entry),
        image_size=size,
        mean=_OWN_STATISTICS.get(network, tuple(views.mean)),
        std=_OWN_STATISTICS.get(network, tuple(views.std)),
        interpolation=_interpolation(views.interpolation.value),
        crop_pct=size / int(views.resize_size[0]),
        licence=str(entry.meta.get("license") or ""),
        file=lambda: _hub_file(name, entry.url),
    )


def _of_timm(name: str, arch: str) -> Published:
    try:
        import timm
    except ImportError:
        raise InputError(f"{name} needs timm: pip install timm") from None
    tagged = name_and_options(arch)[0]
    network, _, tag = tagged.partition(".")
    if not timm.is_model(network):
        known = timm.list_models()
        raise InputError(f"timm has no classifier {network!r}{did_you_mean(network, known)}; timm.list_models() lists them")
    tags = [one.partition(".")[2] for one in timm.list_pretrained(f"{network}.*")]
    if tag and tag not in tags:
        raise InputError(
            f"{name}: timm has no weights {tag!r} of {network}{did_you_mean(tag, tags)}; "
            + (f"it has {', '.join(tags)}" if tags else "it has none")
        )
    config: Any = timm.get_pretrained_cfg(tagged)
    if config is None or not config.has_weights:
        raise InputError(f"{name}: timm publishes no weights of {network}; timm.list_pretrained() lists those it has")
    return Published(
        name=name,
        arch=arch.replace(tagged, network, 1),
        library="timm",
        key=f"{network}.{config.tag}" if config.tag else network,
        **timm_form(config.to_dict()),
        licence=config.license if config.license != "unknown" else "",
        file=lambda: _hugging_face_file(name, config) if config.hf_hub_id else _hub_file(name, config.url),
        remark="" if config.crop_mode == "center" else f"timm's crop mode is {config.crop_mode!r}, here the centre is cut",
    )


def timm_form(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the form of the images that a configuration of timm's (`pretrained_cfg`) declares."""
    size = min(config["input_size"][1:])
    return {
        "image_size": size,
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
        "interpolation": _interpolation(config["interpolation"]),
        "crop_pct": size / floor(size / config["crop_pct"]),  # timm rounds down the size that it resizes to.
    }


def _interpolation(name: str) -> str:
    return "bicubic" if name in ("bicubic", "lanczos") else "bilinear"


def _hub_file(name: str, url: str) -> Path:
    """Return the file of an address in the cache of `torch.hub`, as `torch.hub.load_state_dict_from_url` finds it."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / url.rpartition("/")[2]
    if path.is_file():
        return path
    digest = re.search(r"-([a-f0-9]{8,})\.", path.name)
    with _explained(name, url, folder, "TORCH_HOME"), _not_waiting():
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), digest[1] if digest else None, progress=sys.stderr.isatty())
    return path


def _hugging_face_file(name: str, config: Any) -> Path:
    """Return the file of weights in the cache of the Hugging Face hub, as timm does: safetensors, else torch's."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, _, revision = config.hf_hub_id.partition("@")
    files = (config.hf_hub_filename,) if config.hf_hub_filename else ("model.safetensors", "pytorch_model.bin")
    for file in files:  # The cache needs no network, not even a question whether there is something newer.
        with suppress(LocalEntryNotFoundError):
            return Path(hf_hub_download(repository, file, revision=revision or None, local_files_only=True))
    folder, address = Path(constants.HF_HUB_CACHE), f"{constants.ENDPOINT}/{repository}"
    with _explained(name, address, folder, "HF_HOME"):
        for file in files:
            with suppress(EntryNotFoundError):  # The download itself would ask five more times, for half a minute.
                get_hf_file_metadata(hf_hub_url(repository, file, revision=revision or None), timeout=_SECONDS)
                return Path(hf_hub_download(repository, file, revision=revision or None))
        raise InputError(f"{name}: {address} has none of {', '.join(files)}")


@contextmanager
def _explained(name: str, address: str, folder: Path, variable: str) -> Iterator[None]:
    """Say in one sentence why weights could not be downloaded, and what else there is."""
    try:
        yield
    except InputError:
        raise
    except Exception as fault:  # Each version of the libraries has its own.
        reason = next((line for line in str(_origin(fault)).splitlines() if line.strip()), type(fault).__name__)
        arch = name.partition("@")[0]
        raise InputError(
            f"{name}: the weights are not in {folder}, and {address} could not be read ({reason.strip(' .')}). Run the same "
            f"where there is a network and copy that folder ({variable} names its place), or give a file: {arch}@FILE"
        ) from fault


def _origin(fault: Exception) -> Exception:
    """Return what is behind an error of `urllib`, or the error."""
    reason = getattr(fault, "reason", None)
    return reason if isinstance(reason, Exception) else fault


@contextmanager
def _not_waiting() -> Iterator[None]:
    """Give up on connections that are silent for long; torch sets no limit of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
