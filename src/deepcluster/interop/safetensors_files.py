"""Safetensors: the weights of a trunk, with what is needed to use them as text."""

import json
from pathlib import Path
from typing import Any

from deepcluster import __version__
from deepcluster.interop.exports import Written
from deepcluster.interop.sobel_folding import fold_sobel as folded_sobel
from deepcluster.interop.state_dicts import save_state, state_of
from deepcluster.run.model import Model
from deepcluster.run.settings import Settings

# Key of the settings of a run, as JSON, in the metadata and in config.json.
SETTINGS = "deepcluster_settings"


def write_safetensors(model: Model, out: Path, *, fold_sobel: bool = False) -> Written:
    """Write the weights of a trunk, and as metadata how its images are prepared and the settings of its run.

    With `fold_sobel` the first convolution is another than that of the settings, which are left out then.

    Raises:
        InputError: safetensors is not installed, or the Sobel layer can't be folded.
    """
    folded = folded_sobel(model.trunk, model.image_size) if fold_sobel else None
    facts = metadata(model)
    if folded:
        facts["sobel"] = f"folded into {folded.layer}"
        del facts[SETTINGS]
    save_state(state_of(folded.trunk if folded else model.trunk), out, facts)
    return Written(
        left_out="" if model.assignment is None else "the clusters (--format huggingface keeps them)",
        read_with=(
            "import safetensors.torch; state = safetensors.torch.load_file({out!r})"
            if folded
            else "import deepcluster; model = deepcluster.load({out!r})"
        ),
        notes=(folded.describe(),) if folded else (),
    )


def metadata(model: Model) -> dict[str, str]:
    """Return how images are prepared for a model, and the settings of its run, as text."""
    mean, deviation = normalisation(model.settings)
    return {
        "arch": model.trunk.arch,
        "image_size": str(model.image_size),
        "sobel": str(model.trunk.sobel is not None).lower(),
        "mean": json.dumps(mean),
        "std": json.dumps(deviation),
        "crop": f"shorter side to {model.view.resized}, centre crop of {model.image_size}, {model.view.interpolation}",
        "deepcluster_version": __version__,
        SETTINGS: json.dumps(settings_to_share(model)),
    }


def settings_to_share(model: Model) -> dict[str, Any]:
    """Return the settings of a run without the paths of the machine that it ran on, and `trained` if they are no run's."""
    return {**model.settings.as_dict(), "init": None, "cache": "auto", **({} if model.trained else {"trained": False})}


def normalisation(settings: Settings) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation, per channel, by which images in [0, 1] are normalised."""
    return [float(value) for value in settings.mean], [float(value) for value in settings.std]
