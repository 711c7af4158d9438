"""How far a GGUF is from its source: both run in llama.cpp on the same tokens."""
