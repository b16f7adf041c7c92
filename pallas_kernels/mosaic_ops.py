"""Entry points of the Mosaic kernels, gathered for the public API."""

from pallas_kernels.block_list_op import attend_blocks
from pallas_kernels.column_sums_op import column_sums
from pallas_kernels.gather_op import attend_columns, attend_windows
from pallas_kernels.threshold import row_thresholds

__all__ = ["attend_blocks", "attend_columns", "attend_windows", "column_sums", "row_thresholds"]
