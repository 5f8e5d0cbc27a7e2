"""Input images that excite the filters of a trunk, found by gradient ascent."""
