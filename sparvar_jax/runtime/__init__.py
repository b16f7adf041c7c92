"""Compiling and running the steps of a generation."""
