add_library(TensorRT::TensorRT INTERFACE IMPORTED)
target_link_libraries(TensorRT::TensorRT INTERFACE host_gpu)
set(TensorRT_FOUND TRUE)
