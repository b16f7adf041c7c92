"""Transformers, tokenizers and text encoders as thin nnx modules."""
