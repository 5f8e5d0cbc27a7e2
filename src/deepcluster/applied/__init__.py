"""A model applied to images without training: features, clusters, and what they are used for; one module per command."""
