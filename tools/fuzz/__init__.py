"""Fuzzing of everything that reads a stranger's file: see ``python -m tools.fuzz --help``."""
