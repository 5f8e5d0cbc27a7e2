"""A folder in the layout of the Hugging Face hub: config.json, model.safetensors, a model card, and the clusters.

timm opens it (`local-dir:`) where the network is one of timm's; the others are opened by `deepcluster.load`.
"""

import json
import re
from pathlib import Path
from typing import Any

from deepcluster import __version__
from deepcluster.core.errors import InputError
from deepcluster.data.views import ClusterView
from deepcluster.interop.cluster_files import NAME as CLUSTERS
from deepcluster.interop.cluster_files import write_clusters
from deepcluster.interop.exports import Written
from deepcluster.interop.safetensors_files import (
    SETTINGS,
    metadata,
    normalisation,
    settings_to_share,
)
from deepcluster.interop.state_dicts import LibraryNetwork, library_network, save_state, state_of
from deepcluster.run.model import Model

USUAL_CROP = 0.875
# What the card of a network of timm, or of another, names as its reader.
TIMM, OURS = "timm", "deepcluster"

READ_BY_TIMM = """import timm

net = timm.create_model("hf-hub:USER/NAME", pretrained=True, num_classes=0)  # or "local-dir:FOLDER"
"""
READ_BY_US = """import deepcluster

model = deepcluster.load("FOLDER")  # model.trunk is a torch.nn.Module
"""
CARD = """---
license: {licence}
library_name: {library}
pipeline_tag: image-feature-extraction
tags:
- image-feature-extraction
{tags}---

{about}
```python
{reading}```

Images are RGB. The shorter side is resized to {resized} pixels ({interpolation}, antialiased), the centre of {side} × {side}
is cut out, and values in [0, 1] are normalised by the mean {mean} and the standard deviation {deviation}.
{file_of_clusters}"""
TAGS = "- self-supervised-learning\n- deepcluster\n"
ABOUT_RUNS = """# {arch} trained by {method}

Visual features learned from images without labels: {arch}{edges}, without a classifier, {features} features. Settings:
{epochs} epochs, {clusters}; all of them are in `config.json`. Trained with deepcluster {version}, an implementation of
[DeepCluster](https://arxiv.org/abs/1807.05520).
"""
ABOUT_OTHERS = """# {arch}

{arch}{edges}, without a classifier, {features} features. The weights were not trained with deepcluster {version}, which only
wrote them in this layout, from `{origin}`{remark}: say here where they are from, and how they were trained.
"""
CARD_OF_CLUSTERS = """
`clusters.safetensors` holds the centroids of {count:,} clusters, what takes features to the space they are in, and the
cluster of each image of the training set.
"""


def write_folder(model: Model, out: Path, *, licence: str = "unknown") -> Written:
    """Write the files of a model for the hub.

    Args:
        licence: identifier of the licence in the model card, such as apache-2.0.

    Raises:
        InputError: safetensors is not installed, or the licence is no identifier.
    """
    if not re.fullmatch(r"[\w.+-]+", licence):
        raise InputError(f"--licence {licence!r}: give the identifier of a licence, such as apache-2.0 or cc-by-nc-4.0")
    network = None if model.trunk.sobel is not None else library_network(model.trunk, TIMM)
    save_state(state_of(model.trunk), out / "model.safetensors", metadata(model))
    (out / "config.json").write_text(json.dumps(config(model, network), indent=2) + "\n", encoding="utf-8")
    if model.space is not None and model.assignment is not None:
        write_clusters(model.space, model.assignment, out / CLUSTERS)
    reading = "model = deepcluster.load({out!r})"
    if network:
        reading = "net = timm.create_model('local-dir:' + {out!r}, pretrained=True, num_classes=0)"
    (out / "README.md").write_text(card(model, network, licence), encoding="utf-8")
    notes = ("the model card names no licence: set one with --licence, such as apache-2.0",) if licence == "unknown" else ()
    return Written(read_with=f"import {TIMM if network else OURS}; {reading}", notes=notes)


def config(model: Model, network: LibraryNetwork | None) -> dict[str, Any]:
    """Return config.json: timm's keys, and the settings of the run."""
    mean, deviation = normalisation(model.settings)
    side = model.image_size
    return {
        "architecture": network.name if network else model.trunk.arch,
        "num_classes": 0,
        "num_features": model.trunk.dim,
        **({"model_args": dict(network.options)} if network and network.options else {}),
        "pretrained_cfg": {
            **_layers(model),
            "input_size": [3, side, side],
            "fixed_input_size": bool(network and network.options.get("img_size")),
            "interpolation": model.view.interpolation,
            "crop_pct": crop_share(model.view),
            "crop_mode": "center",
            "mean": mean,
            "std": deviation,
            "num_classes": 0,
        },
        SETTINGS: settings_to_share(model),
    }


def _layers(model: Model) -> dict[str, Any]:
    """Return the names of the first layer and the classifier, which timm replaces for other channels and classes."""
    known = getattr(getattr(model.trunk, "backbone", None), "pretrained_cfg", None) or {}
    names = {key: known[key] for key in ("first_conv", "classifier", "pool_size") if known.get(key)}
    return names or ({"first_conv": "conv1", "classifier": "fc"} if model.trunk.arch.startswith("resnet") else {})


def crop_share(view: ClusterView) -> float:
    """Return the share of the resized image that the crop shows, from which timm finds the size that it resizes to."""
    side, wanted = view.size, view.resized
    return next(one for one in (USUAL_CROP, side / wanted, side / (wanted + 0.5)) if int(side / one) == wanted)


def card(model: Model, network: LibraryNetwork | None, licence: str) -> str:
    """Return the model card, README.md."""
    settings, assignment = model.settings, model.assignment
    mean, deviation = normalisation(settings)
    about = (ABOUT_RUNS if model.trained else ABOUT_OTHERS).format(
        origin=Path(model.name).name,
        remark=f" ({model.remark})" if model.remark else "",
        arch=model.trunk.arch,
        method="DeepCluster-v2" if settings.method == "deepcluster-v2" else "DeepCluster",
        edges=" on the edges of the fixed Sobel layer" if model.trunk.sobel is not None else "",
        features=model.trunk.dim,
        epochs=settings.epochs,
        clusters=settings.describe_clusters(),
        version=__version__,
    )
    return CARD.format(
        licence=licence,
        library=TIMM if network else OURS,
        tags=TAGS if model.trained else "",
        about=about,
        reading=READ_BY_TIMM if network else READ_BY_US,
        side=model.image_size,
        resized=model.view.resized,
        interpolation=model.view.interpolation,
        mean=mean,
        deviation=deviation,
        file_of_clusters="" if assignment is None else CARD_OF_CLUSTERS.format(count=assignment.n_clusters),
    )
