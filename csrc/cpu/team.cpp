#include "cpu/team.h"

#include <cstdlib>
#include <exception>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace fastfip {
namespace {

// The OpenMP runtime that the process has loaded already (torch's), or null. Its threads wait for work by spinning for some
// milliseconds: threads of our own would compete with them for the same cores. It is not linked, so none is needed.
using OpenMp = void (*)(void (*)(void*), void*, unsigned, unsigned);
OpenMp openmp() {
#if defined(__linux__)
    static const OpenMp found = reinterpret_cast<OpenMp>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
#else
    return nullptr;
#endif
}

class Scratch {
   public:
    ~Scratch() { std::free(memory_); }
    char* reserve(int64_t bytes) {
        if (bytes > size_) {
            std::free(memory_);
            size_ = 0;
            memory_ = static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
            if (!memory_) throw std::bad_alloc();
            size_ = bytes;
        }
        return memory_;
    }

   private:
    char* memory_ = nullptr;
    int64_t size_ = 0;
};

}  // namespace

char* reserve_scratch(int64_t bytes) {
    static thread_local Scratch scratch;
    return scratch.reserve(bytes);
}

void run_team(size_t threads, void (*job)(void*), void* data) {
    if (threads <= 1) return job(data);
    if (const OpenMp parallel = openmp()) return parallel(job, data, static_cast<unsigned>(threads), 0);
    std::vector<std::thread> others;
    others.reserve(threads);
    try {
        while (others.size() + 1 < threads) others.emplace_back(job, data);
    } catch (const std::exception&) {
        // No more threads to be had: those that are there do the rest.
    }
    job(data);
    for (std::thread& thread : others) thread.join();
}

}  // namespace fastfip
