"""TensorRT in a process of its own: its libraries, optimisation profiles and what a build process is asked for."""
