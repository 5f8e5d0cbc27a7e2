"""Caffe's messages for `google.protobuf`, which nobody here wrote, and a small network in Caffe's text."""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from deepcluster.interop.caffe import messages

TINY = """
name: "tiny"  # Four layers.
input: "data" input_dim: 1 input_dim: 3 input_dim: 8 input_dim: 8
layer { name: "grey" type: "Convolution" bottom: "data" top: "grey"
  convolution_param { num_output: 1 kernel_size: 1 engine: CAFFE } }
layer { name: "edges" type: "Convolution" bottom: "grey" top: "edges" include { phase: TEST }
  convolution_param < num_output: 2, pad: [1]; kernel_h: 3 kernel_w: 3 > }
layer { name: "norm" type: "BatchNorm" bottom: "edges" top: "edges" batch_norm_param { use_global_stats: true eps: 1e-3 } }
layer { name: "scale" type: "Scale" bottom: "edges" top: "edges" scale_param { bias_term: true } }
layer { name: "relu" type: "ReLU" bottom: "edges" top: "edges" relu_param { negative_slope: -0.0 } }
layer { name: "pool" type: 'Pool' "ing" bottom: "edges" top: "pool" pooling_param { pool: MAX kernel_size: 2 stride: 0x2 } }
layer { name: "fc" type: "InnerProduct" bottom: "pool" top: "fc" inner_product_param { num_output: 4 axis: -3 } }
"""
_TYPES = {
    messages.INT: "TYPE_INT64",
    messages.INTS: "TYPE_INT64",
    messages.BOOL: "TYPE_BOOL",
    messages.FLOAT: "TYPE_FLOAT",
    messages.FLOATS: "TYPE_FLOAT",
    messages.DOUBLES: "TYPE_DOUBLE",
    messages.STRING: "TYPE_STRING",
}
# All others are single, as the enumerations are.
_REPEATED = {
    *("layer", "layers", "input", "input_dim", "input_shape", "bottom", "top", "blobs", "include", "exclude", "data", "dim"),
    *("double_data", "pad", "kernel_size", "stride", "dilation", "stage", "not_stage", "shape", "mean_value"),
}
_SINGLE = {
    ("BlobProto", "shape"),
    ("PoolingParameter", "pad"),
    ("PoolingParameter", "kernel_size"),
    ("PoolingParameter", "stride"),
}
_PACKED = (messages.INTS, messages.FLOATS, messages.DOUBLES)


def net_parameter() -> Any:
    """The class of `NetParameter`, made from the table of fields."""
    file = descriptor_pb2.FileDescriptorProto(name="caffe_subset.proto", package="caffe", syntax="proto2")
    for enum, values in messages.ENUMS.items():
        # In protobuf the names of all values of a package differ.
        scope = file.message_type.add(name=f"In{enum}").enum_type.add(name=enum)
        for number, value in enumerate(values):
            scope.value.add(name=value, number=number)
    for message, fields in messages.MESSAGES.items():
        made = file.message_type.add(name=message)
        for field, (number, kind) in fields.items():
            repeated = field in _REPEATED and (message, field) not in _SINGLE
            added = made.field.add(name=field, number=number)
            added.label = descriptor_pb2.FieldDescriptorProto.Label.Value("LABEL_REPEATED" if repeated else "LABEL_OPTIONAL")
            if kind in _TYPES:
                added.type = descriptor_pb2.FieldDescriptorProto.Type.Value(_TYPES[kind])
                added.options.packed = kind in _PACKED
            elif kind in messages.ENUMS:
                added.type, added.type_name = descriptor_pb2.FieldDescriptorProto.TYPE_ENUM, f".caffe.In{kind}.{kind}"
            else:
                added.type, added.type_name = descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE, f".caffe.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("caffe.NetParameter"))
