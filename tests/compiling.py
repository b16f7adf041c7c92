"""XLA's flags of a test run, set before its backend exists.

On a CPU the tests wait for compilers, not for arithmetic. Each program is one module for LLVM:
splitting it in parts, to compile them side by side, costs a sixth more. XLA's older emitter of
loops, which releases before jaxlib 0.11 have, takes half the time. Releases that are not named may
not know these flags. Processes that tests start inherit them.
"""

import importlib.metadata
import os


def set_flags() -> None:
    """Add the flags to those of the environment, once."""
    version = importlib.metadata.version("jaxlib")
    asked = os.environ.get("XLA_FLAGS", "").split()
    if version.startswith(("0.10.", "0.11.", "0.12.")):
        asked.append("--xla_cpu_parallel_codegen_split_count=1")
    if version.startswith("0.10."):
        asked.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(dict.fromkeys(asked))
