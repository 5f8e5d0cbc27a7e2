"""The gallery of clusters: their facts, the images that are listed, and thumbnails, within fixed limits."""
