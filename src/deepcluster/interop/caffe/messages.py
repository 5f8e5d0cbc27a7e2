"""The messages of Caffe's files as far as networks of this kind use them: names, numbers and types of their fields.

A message is a dictionary from a field's name to the list of its values, in text and in binary files alike. Fields that are
not listed here are skipped in binary files.
"""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray


class Malformed(ValueError):
    """Text or bytes that can't be a file of Caffe, or only a part of one."""


class Word(str):
    """The name of an enumeration's value, which is written without quotes."""

    __slots__ = ()


# A `str` that is no `Word` is quoted; an array holds all values of a field of packed floats.
Value: TypeAlias = "bool | int | float | str | NDArray[np.float32] | NDArray[np.float64] | Message"
Message: TypeAlias = dict[str, list["Value"]]

# Types of fields beside the messages and enumerations below. The plural ones are packed: one field holds all values.
INT, INTS, BOOL, FLOAT, FLOATS, DOUBLES, STRING = "int", "ints", "bool", "float", "floats", "doubles", "string"

ENUMS = {
    "Phase": ("TRAIN", "TEST"),
    "PoolMethod": ("MAX", "AVE", "STOCHASTIC"),
    "RoundMode": ("CEIL", "FLOOR"),
    "Engine": ("DEFAULT", "CAFFE", "CUDNN"),
    "V1LayerType": (
        *("NONE", "ACCURACY", "BNLL", "CONCAT", "CONVOLUTION", "DATA", "DROPOUT", "EUCLIDEAN_LOSS", "FLATTEN"),
        *("HDF5_DATA", "HDF5_OUTPUT", "IM2COL", "IMAGE_DATA", "INFOGAIN_LOSS", "INNER_PRODUCT", "LRN"),
        *("MULTINOMIAL_LOGISTIC_LOSS", "POOLING", "RELU", "SIGMOID", "SOFTMAX", "SOFTMAX_LOSS", "SPLIT", "TANH"),
        *("WINDOW_DATA", "ELTWISE", "POWER", "SIGMOID_CROSS_ENTROPY_LOSS", "HINGE_LOSS", "MEMORY_DATA", "ARGMAX"),
        *("THRESHOLD", "DUMMY_DATA", "SLICE", "MVN", "ABSVAL", "SILENCE", "CONTRASTIVE_LOSS", "EXP", "DECONVOLUTION"),
    ),
}

_PARAMETERS = {
    "convolution_param": "ConvolutionParameter",
    "dropout_param": "DropoutParameter",
    "inner_product_param": "InnerProductParameter",
    "pooling_param": "PoolingParameter",
    "power_param": "PowerParameter",
    "relu_param": "ReLUParameter",
}


def _parameters(*numbers: int) -> dict[str, tuple[int, str]]:
    return {name: (number, kind) for (name, kind), number in zip(_PARAMETERS.items(), numbers, strict=True)}


_WINDOW = {"pad_h": (9, INT), "pad_w": (10, INT)}

# Name of the message -> name of the field -> its number and type.
MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "NetParameter": {
        "name": (1, STRING),
        "layers": (2, "V1LayerParameter"),
        "input": (3, STRING),
        "input_dim": (4, INT),
        "input_shape": (8, "BlobShape"),
        "layer": (100, "LayerParameter"),
    },
    "LayerParameter": {
        "name": (1, STRING),
        "type": (2, STRING),
        "bottom": (3, STRING),
        "top": (4, STRING),
        "blobs": (7, "BlobProto"),
        "include": (8, "NetStateRule"),
        "exclude": (9, "NetStateRule"),
        **_parameters(106, 108, 117, 121, 122, 123),
        "transform_param": (100, "TransformationParameter"),
        "batch_norm_param": (139, "BatchNormParameter"),
        "scale_param": (142, "ScaleParameter"),
        "input_param": (143, "InputParameter"),
    },
    "V1LayerParameter": {
        "bottom": (2, STRING),
        "top": (3, STRING),
        "name": (4, STRING),
        "type": (5, "V1LayerType"),
        "blobs": (6, "BlobProto"),
        "include": (32, "NetStateRule"),
        "exclude": (33, "NetStateRule"),
        **_parameters(10, 12, 17, 19, 21, 30),
        "transform_param": (36, "TransformationParameter"),
    },
    "NetStateRule": {"phase": (1, "Phase"), "stage": (4, STRING), "not_stage": (5, STRING)},
    "BlobProto": {
        "num": (1, INT),
        "channels": (2, INT),
        "height": (3, INT),
        "width": (4, INT),
        "data": (5, FLOATS),
        "shape": (7, "BlobShape"),
        "double_data": (8, DOUBLES),
    },
    "BlobShape": {"dim": (1, INTS)},
    "ConvolutionParameter": {
        "num_output": (1, INT),
        "bias_term": (2, BOOL),
        "pad": (3, INT),
        "kernel_size": (4, INT),
        "group": (5, INT),
        "stride": (6, INT),
        **_WINDOW,
        "kernel_h": (11, INT),
        "kernel_w": (12, INT),
        "stride_h": (13, INT),
        "stride_w": (14, INT),
        "engine": (15, "Engine"),
        "axis": (16, INT),
        "dilation": (18, INT),
    },
    "DropoutParameter": {"dropout_ratio": (1, FLOAT)},
    "InnerProductParameter": {"num_output": (1, INT), "bias_term": (2, BOOL), "axis": (5, INT), "transpose": (6, BOOL)},
    "PoolingParameter": {
        "pool": (1, "PoolMethod"),
        "kernel_size": (2, INT),
        "stride": (3, INT),
        "pad": (4, INT),
        "kernel_h": (5, INT),
        "kernel_w": (6, INT),
        "stride_h": (7, INT),
        "stride_w": (8, INT),
        **_WINDOW,
        "engine": (11, "Engine"),
        "global_pooling": (12, BOOL),
        "round_mode": (13, "RoundMode"),
    },
    "PowerParameter": {"power": (1, FLOAT), "scale": (2, FLOAT), "shift": (3, FLOAT)},
    "ReLUParameter": {"negative_slope": (1, FLOAT), "engine": (2, "Engine")},
    "BatchNormParameter": {"use_global_stats": (1, BOOL), "moving_average_fraction": (2, FLOAT), "eps": (3, FLOAT)},
    "ScaleParameter": {"axis": (1, INT), "num_axes": (2, INT), "bias_term": (4, BOOL)},
    "TransformationParameter": {
        "scale": (1, FLOAT),
        "crop_size": (3, INT),
        "mean_file": (4, STRING),
        "mean_value": (5, FLOAT),
    },
    "InputParameter": {"shape": (1, "BlobShape")},
}
