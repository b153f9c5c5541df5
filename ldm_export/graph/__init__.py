"""Techniques that change the graphs of a bundle: ONNX in, ONNX out. One technique a file."""
