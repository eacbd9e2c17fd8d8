// Threads and memory that kernels share.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace fastfip {

// Run `job(data)` in as many threads at once, those of the OpenMP runtime that the process has loaded where there is one. A job
// takes what there is to do from a counter of its own, so fewer threads than asked for do the same work.
void run_team(size_t threads, void (*job)(void*), void* data);

// One buffer for each calling thread, kept between calls: fresh memory costs a page fault for every 4 KiB.
char* reserve_scratch(int64_t bytes);

}  // namespace fastfip
