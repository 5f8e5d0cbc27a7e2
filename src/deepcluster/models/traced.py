"""Trunks whose stages are found by recording one pass of a blank image.

B batch, C channels, H and W pixels, D features.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deepcluster.models.named import NamedTrunk
from deepcluster.models.trunk import FEATURES

# Where networks keep their blocks; everything else is a block itself.
CONTAINERS = ("features", "layers", "blocks", "trunk_output", "encoder", "encoder.layers")


class _AllRecorded(Exception):
    """Ends a pass at the last map that is needed."""


class TracedTrunk(NamedTrunk):
    """A network each of whose blocks is a stage if its output is a map, in the order of the pass."""

    def find_stages(self, blocks: Sequence[str]) -> None:
        """Set `dim`, and as `stages` those of the blocks that return maps."""
        with self._recorded(blocks) as outputs:
            self.dim = self._blank_features().shape[1]
        self.stages = (*(name for name, output in outputs.items() if self._is_map(output)), FEATURES)

    @abstractmethod
    def _is_map(self, output: Any) -> bool:
        """Return whether the output of a block can be a stage."""

    def _as_maps(self, outputs: Mapping[str, Tensor], edges_BCHW: Tensor) -> dict[str, Tensor]:
        """Return maps (B, C, H, W) of the outputs of stages."""
        return dict(outputs)

    def _found(self, edges_BCHW: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        blocks = [name for name in self.stages[:-1] if name in names]
        # A pass that is being traced can't be ended by an exception; what is not needed is dropped from the trace.
        only = FEATURES not in names and not torch.compiler.is_compiling()
        with self._recorded(blocks, only=only) as outputs:
            features_BD = self.embed(edges_BCHW)
        found = self._as_maps(outputs, edges_BCHW)
        return found | ({FEATURES: features_BD} if FEATURES in names else {})

    def _block(self, name: str) -> nn.Module:
        """Return the block that makes a stage."""
        return self.backbone.get_submodule(name)

    @contextmanager
    def _recorded(self, names: Sequence[str], *, only: bool = False) -> Iterator[dict[str, Tensor]]:
        """Record the outputs of the blocks `names` in the pass inside the context; `only` these: the pass ends there."""
        outputs: dict[str, Tensor] = {}

        def record(name: str, layer: nn.Module, given: Any, output: Tensor) -> None:
            self._record(outputs, name, output)
            if only and len(outputs) == len(names):
                raise _AllRecorded

        hooks = [self._block(name).register_forward_hook(partial(record, name)) for name in names]
        try:
            yield outputs
        except _AllRecorded:
            pass
        finally:
            for hook in hooks:
                hook.remove()

    def _record(self, outputs: dict[str, Any], name: str, output: Any) -> None:
        outputs[name] = output


def blocks_of(backbone: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the blocks of a network with their names: its parts, and those of its containers."""
    for name, layer in backbone.named_children():
        if prefix + name in CONTAINERS:
            yield from blocks_of(layer, f"{prefix}{name}.")
        else:
            yield prefix + name, layer
