"""From scores to the examples that stay: strategies, the baselines that influence has to beat, pruning."""
