"""What the engine's pooled hidden states become: embeddings of the length and the number type that were asked for."""

import numpy as np


def check_dimensions(dimensions: int | None, hidden_size: int) -> None:
    """Raises ValueError for more numbers than a vector has."""
    if dimensions is not None and not 1 <= dimensions <= hidden_size:
        raise ValueError(f"dimensions must be between 1 and {hidden_size:,}, the model's hidden size, got {dimensions}")


def finish_embedding(pooled: bytes, *, dimensions: int | None, normalize: bool) -> np.ndarray:
    """The first `dimensions` (None: all) of float32 numbers, to length 1 if asked for. A vector of zeros stays one."""
    vector = np.frombuffer(pooled, dtype="<f4")[:dimensions]
    length = np.linalg.norm(vector) if normalize else 1.0
    return vector / length if length > 0 else vector
