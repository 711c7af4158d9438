"""Grids of plans with controls, and single experts, measured against what was predicted."""
