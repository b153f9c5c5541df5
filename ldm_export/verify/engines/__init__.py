"""TensorRT engines of a bundle's graphs, built once what they are built from computes what it shall."""
