# The CUDA kernels, for the libraries around them: target teamlora_kernels, for CMAKE_CUDA_ARCHITECTURES.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  # 80 A100; 86 RTX 30, A10; 89 RTX 40, L4; 90 H100; 100 B200; 120 RTX 50, with PTX for what comes after.
  set(CMAKE_CUDA_ARCHITECTURES 80-real 86-real 89-real 90-real 100-real 120)
endif()
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
add_library(teamlora_kernels STATIC ${CMAKE_CURRENT_LIST_DIR}/launch.cu ${CMAKE_CURRENT_LIST_DIR}/plan.cpp)
target_compile_options(teamlora_kernels PRIVATE
  $<$<COMPILE_LANGUAGE:CUDA>:--threads=0 -Xcompiler=-Wall,-Wextra,-Werror>)
target_include_directories(teamlora_kernels SYSTEM PUBLIC ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_include_directories(teamlora_kernels PUBLIC ${CMAKE_CURRENT_LIST_DIR})
