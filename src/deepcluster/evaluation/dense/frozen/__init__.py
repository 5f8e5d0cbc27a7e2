"""Frozen segmentation: what a linear classifier, neighbours or clusters make of the cells of a stage."""
