"""How much memory a model takes in llama.cpp: predicted from its header alone, and what the device has."""
