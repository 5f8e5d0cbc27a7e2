"""What the page holds of the clusters and of the images: facts, rows, thumbnails, within a budget of bytes."""
