"""Fine-tuning for segmentation: fully convolutional networks."""
