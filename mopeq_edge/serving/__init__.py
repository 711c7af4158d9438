"""OpenAI's API for models whose pictures our own tower sees: chat with images, completions with log-probabilities.

llama-server cannot be given embeddings, so here onnxruntime and llama.cpp's library answer. One model context: requests
wait for each other. Needs neither torch nor transformers.
"""
