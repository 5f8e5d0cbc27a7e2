"""Fine-tuning for detection: networks of two stages."""
