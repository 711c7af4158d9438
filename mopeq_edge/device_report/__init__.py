"""What a device is, which llama.cpp it has, what the suite measured there; and two such reports side by side."""
