"""From gradients to influence: what is asked (queries), H^-1 (preconditioners), scores, and sums over checkpoints."""
