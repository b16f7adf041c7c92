"""Measurements behind every figure of the README."""
