"""Initial weights: matched with a trunk by their names and shapes.

They may come from this project, from torchvision or timm, or from another program that trained such a network: its prefix
of the trunk's own names (`module.backbone.`, `encoder_q.`) is found by matching, not from a list.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deepcluster.core.errors import InputError
from deepcluster.models.trunk import Trunk

# Wrappers put these anywhere into names (DataParallel around a part in the 2018 release, torch.compile).
_WRAPPERS = ("module", "_orig_mod")
# With a smaller share of the trunk's tensors the file is of another network.
LEAST_SHARE = 0.8
_EXAMPLES = 4


class Undrawn(TorchFunctionMode):
    """Where networks are made without drawing their weights, which takes seconds; their memory is not even touched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Match:
    """Which tensors of a file are those of a network.

    Attributes:
        arch: the network.
        wanted: its weights by name, without the fixed Sobel layer. They share memory with the network.
        given: the tensors of the file, without what wrappers add to names.
        prefix: what the file puts before the network's own names.
        others: the same of further copies in the file, such as a teacher's or a momentum encoder's.
    """

    arch: str
    wanted: Mapping[str, Tensor]
    given: Mapping[str, Tensor]
    prefix: str
    others: tuple[str, ...] = ()

    @classmethod
    def of(cls, trunk: Trunk, weights: Mapping[str, Tensor]) -> "Match":
        """Find the prefix with which most names fit."""
        state = {key: value for key, value in trunk.state_dict().items() if not key.startswith("sobel.")}
        wanted = {key.removeprefix("backbone."): value for key, value in state.items()}
        given = {without_wrappers(key): value for key, value in weights.items()}
        # The most frequent prefix of the file's names that end like the trunk's; the first one of two copies.
        prefixes: Counter[str] = Counter()
        for key, value in given.items():
            parts = key.split(".")
            for ending in (".".join(parts[first:]) for first in range(len(parts))):
                if ending in wanted and wanted[ending].ndim == value.ndim:
                    prefixes[key.removesuffix(ending)] += 1
        prefix = max(prefixes, key=lambda one: prefixes[one], default="")
        others = [one for one, count in prefixes.items() if one != prefix and count >= LEAST_SHARE * prefixes[prefix]]
        return cls(trunk.arch, wanted, given, prefix, tuple(others))

    @cached_property
    def matching(self) -> dict[str, Tensor]:
        """The file's tensors by the network's names."""
        return {key: self.given[self.prefix + key] for key in self.wanted if self.prefix + key in self.given}

    @property
    def counted(self) -> list[str]:
        """Names of the network that a file should have: BatchNorm's counters are missing in old ones and never read here."""
        return [key for key in self.wanted if not key.endswith("num_batches_tracked")]

    @property
    def missing(self) -> list[str]:
        """Names of the network that the file lacks."""
        matching = self.matching
        return [key for key in self.counted if key not in matching]

    @property
    def differing(self) -> list[str]:
        """Names whose tensors have another shape."""
        return [key for key, value in self.matching.items() if value.shape != self.wanted[key].shape]

    @property
    def left(self) -> list[str]:
        """Names of the file that the network has no place for."""
        copied = {self.prefix + key for key in self.matching}
        return [key for key in self.given if key not in copied and "sobel" not in key.split(".")]

    @property
    def share(self) -> str:
        """How many of the network's tensors the file has, such as `34 of 34`."""
        return f"{len(self.counted) - len(self.missing)} of {len(self.counted)}"

    @property
    def copies(self) -> str:
        """Which copy of the network is used, where the file has several."""
        return f"of several copies that under {self.prefix or 'no prefix'} was used, not {some_of(self.others)}"

    @property
    def fits(self) -> bool:
        """Whether the file is of this network: all shapes are equal, and few tensors are missing."""
        return len(self.missing) <= (1 - LEAST_SHARE) * len(self.counted) and not self.differing


def take_weights(trunk: Trunk, weights: Mapping[str, Tensor], *, name: str) -> str:
    """Copy weights into the trunk where their names match: all or nothing, except that the file may lack a few tensors.

    Args:
        name: name of the file, for messages.

    Returns:
        A sentence for the log: how many tensors were copied, which stay random, which were left out.

    Raises:
        InputError: too few names match, shapes differ, or weights are not finite; the trunk is unchanged.
    """
    match = Match.of(trunk, weights)
    missing, left, matching = match.missing, match.left, match.matching
    if len(missing) > (1 - LEAST_SHARE) * len(match.counted):
        raise InputError(
            f"{name} does not hold the weights of {trunk.arch}: {match.share} names match; the network has "
            f"{some_of(missing)}, the file {some_of(list(match.given))}; use the --arch that the file was trained with"
        )
    _check_values(match, name)
    with torch.no_grad():
        for key, value in matching.items():
            match.wanted[key].copy_(value)
    kept = f"; kept at random {some_of(missing)}" if missing else ""
    lost = f"; left out {some_of(left)}" if left else ""
    copies = f"; {match.copies}" if match.others else ""
    return f"initialised {match.share} tensors of {trunk.arch} from {name}{copies}{kept}{lost}"


def without_wrappers(key: str) -> str:
    """Return the name of a tensor without what DataParallel or torch.compile put into it."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _check_values(match: Match, name: str) -> None:
    """Raise `InputError` where shapes differ or a weight is not finite."""
    arch, wanted, matching, differing = match.arch, match.wanted, match.matching, match.differing
    if differing:
        first = differing[0]
        ours, theirs = wanted[first], matching[first]
        if ours.ndim == 4 and ours.shape[2:] == theirs.shape[2:] and {ours.shape[1], theirs.shape[1]} == {2, 3}:
            colour, edges = "colour images (3 channels)", "the 2 channels of the Sobel layer"
            used, made = (colour, edges) if theirs.shape[1] == 3 else (edges, colour)
            raise InputError(
                f"{name} was trained on {used}, this {arch} takes {made} ({first}); "
                f"use {'--no-sobel' if used == colour else '--sobel'}"
            )
        pairs = [(key, *("×".join(map(str, each[key].shape)) for each in (matching, wanted))) for key in differing]
        shapes = ", ".join(f"{key} {theirs} for {ours}" for key, theirs, ours in pairs[:_EXAMPLES])
        raise InputError(
            f"{name} does not fit {arch}: {len(differing)} tensors have another shape ({shapes}); "
            "use the --arch and the --image-size that the file was trained with"
        )
    broken = [key for key, value in matching.items() if not value.isfinite().all()]
    if broken:
        raise InputError(f"{name} has weights that are not finite: {some_of(broken)}; use an earlier checkpoint")


def some_of(names: Sequence[str]) -> str:
    """Write all of a few names, or how many there are and the first of them."""
    shown = ", ".join(names[:_EXAMPLES])
    return shown if len(names) <= _EXAMPLES else f"{len(names)} tensors ({shown}, …)"
