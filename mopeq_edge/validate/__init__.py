"""Whether a finished GGUF is what it should be: checks that are functions of artifacts. No torch, no transformers."""
