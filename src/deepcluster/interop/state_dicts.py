"""State dicts with the names of torchvision and timm: the library's own `load_state_dict` reads them.

Each is compared with the library's network of that name before it is written: nothing may be missing but the classifier.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepcluster.core.errors import InputError
from deepcluster.interop.cluster_files import save_safetensors
from deepcluster.interop.exports import TAKE_ANY, Written
from deepcluster.interop.sobel_folding import Folded, fold_sobel
from deepcluster.models.archs import TIMM, TORCHVISION
from deepcluster.models.named import NamedTrunk, name_and_options
from deepcluster.models.pretrained import IN_TORCHVISION
from deepcluster.models.statistics import IMAGENET_MEAN, IMAGENET_STD
from deepcluster.models.trunk import Trunk
from deepcluster.run.model import Model

# Our networks that timm has as well, under its names.
IN_TIMM = {"resnet18": "resnet18", "resnet50": "resnet50"}
# The ReLU after the last layer of our VGG-16, whose features are taken before it.
RELU_AFTER = {"vgg16": "classifier.4"}
# Only parameters and buffers with these endings are a layer's.
_TENSORS = (".weight", ".bias")


@dataclass(frozen=True)
class LibraryNetwork:
    """A network as a library constructs it.

    Attributes:
        library: "torchvision" or "timm".
        name: the library's name for it.
        options: arguments of its constructor.
    """

    library: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def in_python(self) -> str:
        """Return the call that constructs it."""
        call = "torchvision.models.get_model" if self.library == "torchvision" else "timm.create_model"
        options = {**self.options, **({} if self.library == "torchvision" else {"num_classes": 0})}
        return f"{call}({', '.join([repr(self.name), *(f'{key}={value!r}' for key, value in options.items())])})"

    def shapes(self) -> dict[str, Tensor]:
        """Return its state dict without values."""
        with torch.device("meta"):
            if self.library == "torchvision":
                import torchvision

                network: nn.Module = torchvision.models.get_model(self.name, weights=None, **self.options)
            else:
                try:
                    import timm
                except ImportError:
                    raise InputError("--format timm needs timm: pip install timm") from None
                network = timm.create_model(self.name, pretrained=False, num_classes=0, **self.options)
        return network.state_dict()


def library_network(trunk: Trunk, library: str) -> LibraryNetwork | None:
    """Return the network of a library that a trunk is, apart from Sobel; None if the library has none like it."""
    own, prefix = (IN_TORCHVISION, TORCHVISION) if library == "torchvision" else (IN_TIMM, TIMM)
    if trunk.arch in own:
        return LibraryNetwork(library, own[trunk.arch])
    if trunk.arch.startswith(prefix) and isinstance(trunk, NamedTrunk):
        return LibraryNetwork(library, name_and_options(trunk.arch)[0], trunk.options)
    return None


def state_of(trunk: Trunk) -> dict[str, Tensor]:
    """Return a trunk's tensors under the names of its library (or of the 2018 release), each a contiguous copy."""
    state = trunk.state_dict()
    return {key.removeprefix("backbone."): value.detach().contiguous().clone() for key, value in state.items()}


def write_torchvision(model: Model, out: Path, *, fold_sobel: bool = False) -> Written:
    """Write the state dict of torchvision's network of the same name.

    Raises:
        InputError: torchvision has no such network.
    """
    return _write(model, out, "torchvision", fold=fold_sobel)


def write_timm(model: Model, out: Path, *, fold_sobel: bool = False) -> Written:
    """Write the state dict of timm's network of the same name.

    Raises:
        InputError: timm has no such network, or is not installed.
    """
    return _write(model, out, "timm", fold=fold_sobel)


def save_state(state: Mapping[str, Tensor], out: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors: safetensors for names with this ending, else as `torch.save`."""
    if out.suffix == ".safetensors":
        save_safetensors(state, out, metadata or {})
        return
    torch.save(dict(state), out)


def own_statistics(model: Model) -> tuple[str, ...]:
    """Return a line on the images that a network takes, where they are not normalised as libraries do by default."""
    settings = model.settings
    if (tuple(settings.mean), tuple(settings.std)) == (IMAGENET_MEAN, IMAGENET_STD):
        return ()
    return (f"images: in [0, 1], less mean {list(settings.mean)}, divided by std {list(settings.std)}",)


def reading(out: str, suffix: str) -> str:
    """Return the Python expression that reads a state dict."""
    return f"safetensors.torch.load_file({out!r})" if suffix == ".safetensors" else f"torch.load({out!r})"


def _write(model: Model, out: Path, library: str, *, fold: bool) -> Written:
    network = library_network(model.trunk, library)
    if network is None:
        others = [one for one in ("torchvision", "timm") if one != library and library_network(model.trunk, one)]
        instead = f"use --format {others[0]}; " if others else ""
        raise InputError(f"{library} has no network like {model.trunk.arch}: {instead}{TAKE_ANY}")
    folded = fold_sobel(model.trunk, model.image_size) if fold else None
    trunk = folded.trunk if folded else model.trunk
    if trunk.sobel is not None:
        raise InputError(
            f"this {trunk.arch} takes the 2 channels of the Sobel layer, and {library} has no such layer: compose it with "
            f"the first convolution with --fold-sobel, or keep it: {TAKE_ANY}"
        )
    state = state_of(trunk)
    missing = _checked_with(network, state, model, folded)
    save_state(state, out)
    return _report(network, missing, model, folded, out.suffix)


def _checked_with(network: LibraryNetwork, state: Mapping[str, Tensor], model: Model, folded: Folded | None) -> list[str]:
    """Return the names that only the library's network has, which are those of its classifier.

    Raises:
        InputError: they are others, or shapes differ.
    """
    shapes = network.shapes()
    changed = f"{folded.layer}.weight" if folded else ""
    differing = [
        key for key, value in state.items() if key in shapes and value.shape != shapes[key].shape and key != changed
    ]
    if differing:
        ours, theirs = (" × ".join(map(str, one[differing[0]].shape)) for one in (state, shapes))
        raise InputError(
            f"{network.library}'s {network.name} is made for other images than those of {model.image_size} px: its "
            f"{differing[0]} is {theirs}, here {ours}; {TAKE_ANY}"
        )
    missing = [key for key in shapes if key not in state]
    layers = {key.rpartition(".")[0] for key in missing}
    if state.keys() - shapes.keys() or len(layers) > 1 or not all(key.endswith(_TENSORS) for key in missing):
        names = sorted(state.keys() ^ shapes.keys())
        raise InputError(f"{network.library}'s {network.name} has other tensors: {', '.join(names[:4])}; {TAKE_ANY}")
    return missing


def _report(network: LibraryNetwork, missing: list[str], model: Model, folded: Folded | None, suffix: str) -> Written:
    imports = f"import {network.library}, {'safetensors.torch, torch' if suffix == '.safetensors' else 'torch'}"
    lines = [imports, f"net = {network.in_python()}"]
    if folded:
        lines.append(f"net.set_submodule({folded.layer!r}, {folded.layer_in_python()})")
    source = reading("{out}", suffix).replace("'{out}'", "{out!r}")
    lines.append(f"net.load_state_dict({source}{', strict=False' if missing else ''})")
    unused = [RELU_AFTER[model.trunk.arch]] if model.trunk.arch in RELU_AFTER else []
    unused += [missing[0].rpartition(".")[0]] if missing else []
    lines += [f"net.set_submodule({layer!r}, torch.nn.Identity())" for layer in unused]
    left = [f"the classifier ({', '.join(missing)}), which DeepCluster does not train"] if missing else []
    left += ["the clusters"] if model.assignment is not None else []
    notes = (*own_statistics(model), *((folded.describe(),) if folded else ()))
    return Written(left_out="; ".join(left), read_with="; ".join([*lines, "net.eval()"]), notes=notes)
