"""Per-example LoRA gradients, exact or projected: one forward and one activation backward of a pack."""
