add_library(CUDA::cudart INTERFACE IMPORTED)
target_link_libraries(CUDA::cudart INTERFACE host_gpu)
set(CUDAToolkit_FOUND TRUE)
