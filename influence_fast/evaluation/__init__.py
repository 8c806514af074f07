"""Generate and grade a model's answers to questions."""
