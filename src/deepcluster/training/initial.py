"""The weights that `--init` names: what they fix of the settings, and their way into the trunk."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepcluster.core.distributed import Ranks
from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.core.files import user_path
from deepcluster.interop.loading import arch_and_path
from deepcluster.interop.pretrained import tensors_of
from deepcluster.interop.weight_files import read_weights
from deepcluster.models.pretrained import PRETRAINED, Published, published
from deepcluster.models.trunk import Trunk
from deepcluster.models.weights import take_weights
from deepcluster.run.recipes import Change
from deepcluster.run.settings import Settings

# The network of `--init pretrained` where the user names none.
USUAL_ARCH = "resnet18"


@dataclass(frozen=True)
class InitialWeights:
    """Weights to start from: published ones, or those of a file or a run.

    Attributes:
        name: value of `--init`.
        arch: the network that it names; None: that of `--arch`.
        published: where a library publishes them.
        path: the file or the run otherwise.
    """

    name: str
    arch: str | None
    published: Published | None
    path: Path

    def _changes(self) -> list[Change]:
        if self.published is None:
            return [Change("arch", self.arch, "the network of the weights")] if self.arch else []
        reasons = {
            "arch": "the network of the weights",
            "sobel": "the weights are for colour images",
            "image_size": "what the weights were trained on; a smaller side is faster, with worse features",
        }
        settings = self.published.settings()
        usual = Settings()
        return [
            Change(name, value, reasons.get(name, "as for the weights"))
            for name, value in settings.items()
            if name in reasons or value != getattr(usual, name)
        ]

    @property
    def about(self) -> str:
        """What published weights are, with their licence; "" for others."""
        return self.published.describe() if self.published else ""

    def fetched(self, ranks: Ranks) -> list[Change]:
        """Download the weights where the library's cache lacks them; return the settings that they fix.

        Raises:
            InputError: they can't be downloaded, or there is no such file.
        """
        if self.published is not None:
            ranks.from_main(lambda: str(self.published and self.published.file()))
            self.published.file()  # The first process of this machine has it now.
        elif not self.path.exists():
            near = did_you_mean(self.name.rpartition("@")[2], [PRETRAINED])
            raise InputError(
                f"--init {self.name}: {self.path} does not exist{near}; give a run, a checkpoint or a file of weights, "
                "pretrained for the published weights of --arch, or a name such as timm:NAME@pretrained"
            )
        return self._changes()

    def into(self, trunk: Trunk) -> str:
        """Copy the weights into a trunk; return a sentence for the log.

        Raises:
            InputError: they do not fit.
        """
        if self.published is None:
            return take_weights(trunk, read_weights(self.path), name=self.name)
        done = take_weights(trunk, tensors_of(self.published, trunk), name=self.published.name)
        return f"{done} ({self.about})"


def initial_weights(options: Mapping[str, Any]) -> InitialWeights | None:
    """Return the weights that the options `init` and `arch` name; None: a run starts from random ones.

    Raises:
        InputError: there are no such weights, or they are of another network than `arch`.
    """
    name, arch = options.get("init"), options.get("arch")
    if name is None:
        return None
    if name == PRETRAINED and not user_path(name).exists():
        return InitialWeights(name, arch or USUAL_ARCH, published(f"{arch or USUAL_ARCH}@{PRETRAINED}"), Path(name))
    named, path = arch_and_path(name)
    weights = published(name) if named and not path.exists() else None
    own = weights.arch if weights else named
    if own and arch and arch not in (own, named):
        raise InputError(f"--init {name} has the weights of {own}, and --arch is {arch}: leave out --arch")
    return InitialWeights(name, own, weights, path)
