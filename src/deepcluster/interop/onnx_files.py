"""ONNX: one file for runtimes without Python or torch, from pixels or normalised images to features or clusters.

B batch, C channels, H and W pixels, D features, P components, K clusters, S super-classes.
"""

import warnings
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from deepcluster import __version__
from deepcluster.clustering.assignment import Assignment
from deepcluster.clustering.whitening import Whitening
from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.core.text import size
from deepcluster.interop.exports import Written
from deepcluster.interop.safetensors_files import metadata, normalisation
from deepcluster.interop.sobel_folding import fold_sobel as folded_sobel
from deepcluster.models.trunk import FEATURES, Trunk
from deepcluster.run.model import Model
from deepcluster.run.space import PredictionSpace, ProjectedSpace, Space

INPUTS = ("normalised", "uint8")
# What a network returns besides maps of stages.
EMBEDDING, PROJECTION, CLUSTER = "embedding", "projection", "cluster"
OUTPUTS = (FEATURES, EMBEDDING, PROJECTION, CLUSTER)
# The oldest set of operators that torch writes without conversion: the most runtimes read it.
OPSET = 18
# Protobuf's limit of a file, less what the graph takes.
MOST_BYTES = 2**31 - 2**24
INPUT_NAME = "images"


class FromPixels(nn.Module):
    """Pixels (B, 3, H, W), uint8, to normalised images, as trunks take them."""

    def __init__(self, mean: list[float], deviation: list[float]) -> None:
        super().__init__()
        self.scale_3: Tensor
        self.shift_3: Tensor
        deviation_3 = torch.tensor(deviation)
        self.register_buffer("scale_3", (1 / (255 * deviation_3)).view(3, 1, 1))
        self.register_buffer("shift_3", (-torch.tensor(mean) / deviation_3).view(3, 1, 1))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return normalised images, float32."""
        return images_BCHW.float() * self.scale_3 + self.shift_3


class Stage(nn.Module):
    """Normalised images to the map (B, C, H, W) of a stage, or, averaged, to rows (B, C); "features" are always rows."""

    def __init__(self, trunk: Trunk, name: str, *, averaged: bool) -> None:
        super().__init__()
        self.trunk, self.name, self.averaged = trunk, name, averaged

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the map or the rows."""
        if self.name == FEATURES:
            return self.trunk(x_BCHW)  # type: ignore[no-any-return]
        return self.trunk.vectors(x_BCHW, self.name) if self.averaged else self.trunk.stage(x_BCHW, self.name)


class Points(nn.Module):
    """Features (B, D) to points (B, P) in the space of the clusters: a projection, a whitening, both, or scores' space."""

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.predictions = space if isinstance(space, PredictionSpace) else None
        self.projection = space.projection if isinstance(space, ProjectedSpace) else None
        whitening = space if isinstance(space, Whitening) else getattr(space, "whitening", None)
        self.mean_D: Tensor | None
        self.components_DP: Tensor | None
        self.register_buffer("mean_D", None if whitening is None else whitening.mean_D.cpu())
        self.register_buffer("components_DP", None if whitening is None else whitening.components_DP.cpu())

    def forward(self, rows_BD: Tensor) -> Tensor:
        """Return points of unit length; float64 if the whitening needs it."""
        if self.predictions is not None:
            return self.predictions.transform(rows_BD)
        points_BP = rows_BD if self.projection is None else self.projection(rows_BD)
        if self.mean_D is None or self.components_DP is None:
            return points_BP
        return normalize((points_BP - self.mean_D).to(self.components_DP.dtype) @ self.components_DP)


class NearestCluster(nn.Module):
    """Points (B, P) to the number of the nearest centroid, int64, and the distance to it, float32."""

    def __init__(self, assignment: Assignment) -> None:
        super().__init__()
        self.centroids_KP: Tensor
        self.register_buffer("centroids_KP", assignment.centroids_KP.cpu())
        supers_SP, supers_K = assignment.super_centroids_SP, assignment.super_of_cluster_K
        if supers_SP is not None and supers_K is not None:
            used, supers_K = supers_K.cpu().unique(return_inverse=True)
            supers_SP = supers_SP.cpu()[used]
        self.supers_SP: Tensor | None
        self.super_of_cluster_K: Tensor
        self.register_buffer("supers_SP", supers_SP)
        self.register_buffer("super_of_cluster_K", supers_K)

    def forward(self, points_BP: Tensor) -> tuple[Tensor, Tensor]:
        """Return cluster (B,) and distance (B,)."""
        points_BP = points_BP.to(self.centroids_KP.dtype)
        costs_BK = _costs(points_BP, self.centroids_KP)
        if self.supers_SP is not None:
            # Only clusters of the nearest super-class.
            supers_B1 = _costs(points_BP, self.supers_SP.to(points_BP.dtype)).argmin(dim=1, keepdim=True)
            costs_BK = costs_BK.masked_fill(self.super_of_cluster_K != supers_B1, torch.inf)
        cluster_B = costs_BK.argmin(dim=1)
        return cluster_B, (points_BP - self.centroids_KP[cluster_B]).square().sum(dim=1).sqrt().float()


def _costs(points_BP: Tensor, centroids_KP: Tensor) -> Tensor:
    """Return squared distances (B, K), less the squared length of each point."""
    return centroids_KP.square().sum(dim=1) - 2 * points_BP @ centroids_KP.T


def write_onnx(
    model: Model,
    out: Path,
    *,
    output: str = FEATURES,
    input: str = "normalised",
    fold_sobel: bool = False,
) -> Written:
    """Write a network as one ONNX file, for batches of any number of images.

    Args:
        output: "features"; "embedding", the rows that `deepcluster embed` writes; a stage, whose map is returned;
            "projection", points in the space of the clusters; "cluster", the nearest cluster and its distance.
        input: "normalised" (float32) or "uint8" (pixels, 0 to 255); (B, 3, S, S), RGB, S the image size.
        fold_sobel: compose the Sobel layer with the first convolution.

    Raises:
        InputError: onnx is not installed, there is no such output or input, or the file would have over 2 GB.
    """
    onnx = _needs_onnx()
    if input not in INPUTS:
        raise InputError(f"--input {input}: use one of {', '.join(INPUTS)}{did_you_mean(input, INPUTS)}")
    folded = folded_sobel(model.trunk, model.image_size) if fold_sobel else None
    network, names = _network(model, folded.trunk if folded else model.trunk, output, pixels=input == "uint8")
    n_bytes = sum(one.nbytes for one in (*network.parameters(), *network.buffers()))
    if n_bytes > MOST_BYTES:
        raise InputError(f"an ONNX file holds at most 2 GB, and this network has {size(n_bytes)}: use --format safetensors")
    side = model.image_size
    blank_BCHW = torch.zeros(2, 3, side, side, dtype=torch.uint8 if input == "uint8" else torch.float32)
    written = _exported(network, blank_BCHW, names, model.trunk.arch)
    mean, deviation = metadata(model)["mean"], metadata(model)["std"]
    facts = {
        "arch": model.trunk.arch,
        "image_size": str(side),
        "output": output,
        "input": input,
        "mean": mean,
        "std": deviation,
    }
    onnx.helper.set_model_props(written, facts)
    written.producer_name, written.producer_version = "deepcluster", __version__
    try:
        onnx.save_model(written, str(out))
        onnx.checker.check_model(str(out), full_check=True)
    except (ValueError, onnx.checker.ValidationError) as fault:
        raise InputError(f"{model.trunk.arch} can't be written as ONNX: {fault}") from None
    kind = (
        "uint8, pixels 0 to 255" if input == "uint8" else f"float32, in [0, 1], less mean {mean}, divided by std {deviation}"
    )
    shapes = f"input: {INPUT_NAME} (batch, 3, {side}, {side}), RGB, {kind}; output: {', '.join(names)}"
    return Written(
        left_out="" if model.assignment is None or output == CLUSTER else "the clusters (--output cluster)",
        read_with=(
            "import onnxruntime; outputs = onnxruntime.InferenceSession({out!r})"
            f".run(None, {{{INPUT_NAME!r}: {INPUT_NAME}}})"
        ),
        notes=(shapes, *((folded.describe(),) if folded else ())),
    )


def _needs_onnx() -> Any:
    try:
        import onnx
        import onnx.checker
        import onnxscript  # noqa: F401
    except ImportError:
        raise InputError("--format onnx needs onnx and onnxscript: pip install onnx onnxscript") from None
    return onnx


def _network(model: Model, trunk: Trunk, output: str, *, pixels: bool) -> tuple[nn.Sequential, tuple[str, ...]]:
    """Return the network of an output, and the names of what it returns.

    Raises:
        InputError: there is no such output, or the model has no clusters.
    """
    if output not in (*OUTPUTS, *trunk.stages):
        known = (*OUTPUTS, *(stage for stage in trunk.stages if stage != FEATURES))
        raise InputError(f"--output {output}: {trunk.arch} has {', '.join(known)}{did_you_mean(output, known)}")
    of_clusters = output in (PROJECTION, CLUSTER)
    stage = model.settings.cluster_stage if of_clusters else trunk.embed_stage if output == EMBEDDING else output
    parts: list[nn.Module] = [FromPixels(*normalisation(model.settings))] if pixels else []
    parts.append(Stage(trunk, stage, averaged=output in OUTPUTS))
    names: tuple[str, ...] = (output.replace(".", "_"),)
    if of_clusters:
        space, assignment = model.clusters()
        parts.append(Points(space))
        if output == CLUSTER:
            parts.append(NearestCluster(assignment))
            names = (CLUSTER, "distance")
    return nn.Sequential(*parts).eval(), names


def _exported(network: nn.Module, images_BCHW: Tensor, names: tuple[str, ...], arch: str) -> Any:
    """Return the network as ONNX, of a batch of any number."""
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            program = torch.onnx.export(
                network,
                (images_BCHW,),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=[INPUT_NAME],
                output_names=list(names),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as fault:
        reason = next(iter(str(fault.__cause__ or fault).splitlines()), "")
        raise InputError(f"torch can't write {arch} as ONNX ({reason}); use --format safetensors") from fault
    return program.model_proto  # type: ignore[union-attr]
