"""Measures: of rankings and clusters, of boxes and of maps of classes."""
