"""One lazy interface over a Hugging Face directory and over a GGUF file."""
