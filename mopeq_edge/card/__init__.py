"""Model cards of finished GGUF files for the Hugging Face Hub."""
