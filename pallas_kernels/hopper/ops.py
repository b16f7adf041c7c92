"""Entry points of the attention kernels; importing them takes a jax with Mosaic GPU."""

from pallas_kernels.hopper.block_list_op import attend_blocks
from pallas_kernels.hopper.column_sums_op import column_sums
from pallas_kernels.hopper.gather_op import attend_columns, attend_windows
from pallas_kernels.hopper.threshold import row_thresholds

__all__ = ["attend_blocks", "attend_columns", "attend_windows", "column_sums", "row_thresholds"]
