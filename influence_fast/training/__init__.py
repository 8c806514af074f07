"""Models from disk or the hub, and their fine-tuning."""
