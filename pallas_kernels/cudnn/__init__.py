"""Attention through cuDNN's flash kernels, without a kernel of ours: `backend` is the way in."""
