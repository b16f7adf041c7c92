"""PyTorch checkpoints to Orbax and back, exactly; the only package that imports torch."""
