"""Do the scores tell what retraining does? Fine-tunings without parts of the pool, and measures of agreement."""
