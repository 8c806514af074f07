"""One packed step: a model opened for it, its forward and backward, and the sums that make rows."""
