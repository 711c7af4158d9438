"""Tests that a user runs on the device: ``pytest runtime_tests --model out.gguf``."""
