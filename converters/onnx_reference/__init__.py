"""A second opinion on a finished GGUF: logits and routing computed with standard ONNX operators in onnxruntime.

It shares nothing with llama.cpp but the file: gguf-py dequantizes, onnxruntime computes, in float32, an expert at a
time. Needs no torch. :func:`run_reference` is the way in.
"""

from converters.onnx_reference.run import ReferenceResult, Routed, run_reference

__all__ = ["ReferenceResult", "Routed", "run_reference"]
