"""The llama.cpp that mopeq-edge builds, finds and runs."""
