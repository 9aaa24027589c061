// Between fibres.cpp, which runs the threads of a cluster, and hopper.cpp, which does what happens beside them.
#pragma once

#include "emulation.h"

namespace emulation {

// This thread's number among those of the cluster; how many a block has.
int number_in_cluster();
int threads_of_block();
char* shared_of(int rank);
// All threads of a block of the cluster: nothing may reach it any more.
bool has_ended(int rank);

// Holds this thread until the condition is true. `what`: for the report of a deadlock.
void until(const std::function<bool()>& condition, const char* what);

// Around each cluster's run. A step does something that may happen now; with `idle`, when all threads are held,
// whatever there is. False: nothing was done.
void begin_asynchronous(int cluster, int shared_bytes);
bool step_asynchronous(bool idle);
void end_asynchronous();
bool is_shuffled();

}  // namespace emulation
