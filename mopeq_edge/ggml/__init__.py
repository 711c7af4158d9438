"""ggml's types, and its quantizers through the library that llama.cpp builds."""
