"""Groups of workers that share a model."""
