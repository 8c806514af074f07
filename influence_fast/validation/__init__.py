"""Validate scores by retraining: fine-tunings without parts of the pool, and measures of agreement."""
