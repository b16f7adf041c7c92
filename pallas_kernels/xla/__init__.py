"""Every operation in plain XLA: it runs everywhere, and is what kernels are compared with."""
