// Kernels that break things on purpose, for cuda_lost_device_test alone.
#pragma once

namespace turbomind::cuda::testing {

// Ends a kernel in a trap: the device's context is lost for the rest of the process, as after a fault
// of the hardware or of any other library in the process.
void lose_the_device();

// Launches a kernel that holds code for another architecture than device 0's. Throws what
// cuda_check makes of that.
void launch_without_code();

}  // namespace turbomind::cuda::testing
