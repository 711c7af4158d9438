"""Pictures on the device: a file becomes tiles, a tower in onnxruntime makes embeddings of them, llama.cpp reads those.

Nothing here needs torch or transformers. What a tower wants is said by the file that holds it.
"""
