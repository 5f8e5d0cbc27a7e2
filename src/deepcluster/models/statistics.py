"""Mean and standard deviation of ImageNet's pixels per channel (RGB, 0 to 1), by which images are normalised; their crop."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Share of the shorter side of a resized image that the centre crop shows: 224 of 256 (section 3 of the paper).
CROP_PCT = 0.875
