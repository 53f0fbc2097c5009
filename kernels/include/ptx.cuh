// All inline PTX of the project: thin wrappers, each with its body for the GPU and its body for the host
// device.
#pragma once

#include "ptx/async_copy.cuh"
#include "ptx/barrier.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/math.cuh"
#include "ptx/matrix.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/memory.cuh"
#include "ptx/mma.cuh"
#include "ptx/opaque.cuh"
#include "ptx/tensor_copy.cuh"
#include "ptx/wgmma.cuh"
