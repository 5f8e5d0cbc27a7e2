"""Networks of the user's own as trunks: `register` names what makes one (`models.archs`); `Model`s take one in memory.

B batch, C channels, H and W pixels, D features.
"""

import hashlib
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, Self

import torch
from torch import Tensor, nn

from deepcluster.core.errors import InputError
from deepcluster.models.named import MISFITS, misfit
from deepcluster.models.traced import CONTAINERS, TracedTrunk
from deepcluster.models.trunk import normalise

# The stage that is the network's own output, where that is a map.
OUTPUT = "output"
WANTED = "rows of features (N, D), or maps (N, C, H, W), which are averaged"


class CustomTrunk(TracedTrunk):
    """A module of the user's own. Its output is the features, averaged over rows and columns where it is a map.

    The stages are its blocks that return maps, each of which is called once in a pass, and the output if it is one.

    Args:
        arch: `custom:NAME`.
        module: takes normalised images (B, 3, H, W), or the two channels of the Sobel layer.

    Raises:
        InputError: it returns something else.
    """

    def __init__(self, arch: str, module: nn.Module, *, image_size: int, sobel: bool) -> None:
        super().__init__(arch, module, {}, image_size=image_size, sobel=sobel)
        names = [name for name, layer in _blocks(module) if name != OUTPUT and _is_stage(layer)]
        self.find_stages([*names, OUTPUT])

    @classmethod
    def of(cls, arch: str, module: object, *, image_size: int, sobel: bool = False) -> Self:
        """Return the trunk of a module in float32; where it can't take images of this size, the error names sizes that fit.

        Raises:
            InputError: it is no module, or does not take images and return features.
        """
        if not isinstance(module, nn.Module):
            raise InputError(f"{arch} must be a torch.nn.Module that returns {WANTED}, not {type(module).__name__}")
        module = module.float()
        try:
            return cls(arch, module, image_size=image_size, sobel=sobel)
        except MISFITS as fault:

            def make(size: int) -> "CustomTrunk":
                return cls(arch, deepcopy(module).to("meta"), image_size=size, sobel=sobel)

            taken = "make it take normalised images (N, 3, H, W)"
            raise misfit(arch, image_size, fault, make, sobel=sobel, otherwise=taken) from fault

    def embed(self, edges_BCHW: Tensor) -> Tensor:
        output: Any = self.backbone(edges_BCHW)
        if not isinstance(output, Tensor) or output.dim() not in (2, 4) or len(output) != len(edges_BCHW):
            found = f"a tensor of {list(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise InputError(f"{self.arch} returns {found} for {len(edges_BCHW)} images; it must return {WANTED}")
        return output.mean(dim=(2, 3)) if output.dim() == 4 else output

    @torch.no_grad()
    def fingerprint(self) -> str:
        """Return a hash of the outputs of all stages: it changes with the code of the module, not only with its weights."""
        device = next((weights.device for weights in self.backbone.parameters()), None)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(0, 256, (1, 3, self.image_size, self.image_size), generator=generator, dtype=torch.uint8)
        was_training, dtype = self.training, next((weights.dtype for weights in self.backbone.parameters()), torch.float32)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # The last bits of some networks depend on it.
        try:
            outputs = self.eval().maps(normalise(noise).to(device, dtype), self.stages)
        finally:
            torch.set_num_threads(threads)
            self.train(was_training)
        found = hashlib.sha256()
        for name in self.stages:
            found.update(f"{name} {list(outputs[name].shape)}".encode())
            found.update(outputs[name].double().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def _is_map(self, output: Any) -> bool:
        return isinstance(output, Tensor) and output.dim() == 4 and len(output) == 1

    def _block(self, name: str) -> nn.Module:
        return self.backbone if name == OUTPUT else self.backbone.get_submodule(name)

    def _record(self, outputs: dict[str, Any], name: str, output: Any) -> None:
        # A block that is called twice is no stage. The copy is safe from layers that work in place.
        outputs[name] = output.clone() if name not in outputs and isinstance(output, Tensor) else None


def _blocks(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the blocks of a module with their names: its parts, those of containers, and those of an only part."""
    children = list(module.named_children())
    for name, layer in children:
        has_parts = any(True for _ in layer.children())
        if has_parts and (prefix + name in CONTAINERS or isinstance(layer, nn.ModuleList) or len(children) == 1):
            yield from _blocks(layer, f"{prefix}{name}.")
        else:
            yield prefix + name, layer


def _is_stage(layer: nn.Module) -> bool:
    """Return True for an activation and for what has parts; False for a convolution, a norm or a pool."""
    return any(True for _ in layer.children()) or type(layer).__module__ == "torch.nn.modules.activation"
