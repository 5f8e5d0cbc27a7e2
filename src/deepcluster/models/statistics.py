"""Mean and standard deviation of ImageNet's pixels per channel (RGB, 0 to 1), by which images are normalised."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
