"""Caffe as a format of `deepcluster export`: the network, and the layer that scores its clusters if the model has one."""

from pathlib import Path

from deepcluster.interop.caffe.write import write_caffe
from deepcluster.interop.exports import Written
from deepcluster.interop.release2018_export import head_of, saved_state
from deepcluster.interop.release2018_files import top_layer_of
from deepcluster.run.model import Model


def write_files(model: Model, out: Path) -> Written:
    """Write OUT.prototxt and OUT.caffemodel.

    Raises:
        InputError: another network than AlexNet or VGG-16, or a size at which Caffe computes something else.
    """
    head = head_of(model, saved_state(model))
    layer = None if head is None else top_layer_of(head)
    settings = model.settings
    scores = None if layer is None else (layer["top_layer.weight"], layer["top_layer.bias"])
    write_caffe(model.trunk, out, top_layer=scores, mean=settings.mean, std=settings.std, image_size=model.image_size)
    return Written(
        left_out="" if head is not None or model.assignment is None else "the clusters, for which there is no linear layer",
        read_with="import cv2; net = cv2.dnn.readNetFromCaffe({out.prototxt!r}, {out.caffemodel!r})",
        notes=("input: BGR pixels, 0 to 255, without subtracting a mean",),
    )
