"""Inner products of stored rows with queries: native C++ and CUDA, and PyTorch where those are missing."""
