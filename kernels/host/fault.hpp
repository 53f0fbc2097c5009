// Turns a CPU fault inside a kernel (illegal address, stack overflow, division by zero) into a launch error.
#pragma once

namespace host {

/// Called once by every thread that runs blocks.
void catch_faults_of_this_thread();

} // namespace host
