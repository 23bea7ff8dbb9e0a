"""A weight of integers in groups of inputs, in the form that a body of `grouped_linear` has chosen for its device."""

from dataclasses import dataclass

from torch import Tensor

ROWS_TOGETHER = 16  # what is put into a weight at a time begins at a multiple of these rows


@dataclass(frozen=True)
class GroupedWeight:
    """W [out, in] = (q - zero) · scale, both of a group of `group_size` inputs. What lies where is the body's."""

    out_features: int
    bits: int  # of q, 4 or 8
    group_size: int
    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
