"""The images of a data set that excite a filter most."""
