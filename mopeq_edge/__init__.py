"""Mixture-of-Experts models on edge devices: sensitivity, plan, GGUF, proof."""

__version__ = "0.1.0"
