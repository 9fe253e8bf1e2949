"""The operations on weights. This file alone chooses who computes them.

The reference in plain PyTorch serves every device. A faster implementation has to write the same
integer stream and agree with the reference's normals to rounding.
"""

from flatlora.ops.philox import Stream, noise_key
from flatlora.ops.reference import merged_row_std, noisy_copy, row_square_norm

__all__ = ["Stream", "merged_row_std", "noise_key", "noisy_copy", "row_square_norm"]
