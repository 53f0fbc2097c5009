// What the host device says about itself (cuDeviceGetAttribute).
#pragma once

namespace host {

inline constexpr char device_name[] = "effnetv2 host device";
inline constexpr int driver_version = 12080;
inline constexpr int multiprocessors = 4;
inline constexpr int blocks_per_multiprocessor = 32;
inline constexpr int threads_per_multiprocessor = 2048;

/// Value of a CUdevice_attribute; 0 for those that do not matter here.
int device_attribute(int attribute);

} // namespace host
