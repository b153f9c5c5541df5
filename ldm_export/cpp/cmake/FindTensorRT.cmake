# TensorRT::TensorRT, from TENSORRT_ROOT, a variable of CMake or of the environment: the folder of NVIDIA's release archive of
# TensorRT, or, with the component rtx, of TensorRT-RTX. Without it the system's own.
set(TensorRT_NAMES nvinfer)
if("rtx" IN_LIST TensorRT_FIND_COMPONENTS)
  set(TensorRT_NAMES tensorrt_rtx)
endif()
find_path(TensorRT_INCLUDE_DIR NvInferRuntime.h HINTS ${TENSORRT_ROOT} $ENV{TENSORRT_ROOT} PATH_SUFFIXES include)
find_library(TensorRT_LIBRARY NAMES ${TensorRT_NAMES} HINTS ${TENSORRT_ROOT} $ENV{TENSORRT_ROOT} PATH_SUFFIXES lib lib64)
mark_as_advanced(TensorRT_INCLUDE_DIR TensorRT_LIBRARY)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TensorRT REQUIRED_VARS TensorRT_LIBRARY TensorRT_INCLUDE_DIR
  REASON_FAILURE_MESSAGE "Set TENSORRT_ROOT to the folder of NVIDIA's release archive, or LDM_TENSORRT to OFF.")
if(TensorRT_FOUND AND NOT TARGET TensorRT::TensorRT)
  add_library(TensorRT::TensorRT UNKNOWN IMPORTED)
  set_target_properties(TensorRT::TensorRT PROPERTIES
    IMPORTED_LOCATION ${TensorRT_LIBRARY} INTERFACE_INCLUDE_DIRECTORIES ${TensorRT_INCLUDE_DIR})
endif()
