"""Caffe models, a .prototxt and a .caffemodel each: `read.read_caffe`, `write.write_caffe`; without Caffe or protobuf."""
