"""Pictures that excite a filter, by gradient ascent."""
