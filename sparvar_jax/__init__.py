"""Visual autoregressive generation in JAX: models, plans, policies and pipelines."""

__version__ = "0.1.0"
