// The numbers of fastfip.h in the order of the bindings' arguments, as ctypes hands them over.
#pragma once

#include <string.h>

#include <exception>

#include "fastfip.h"

namespace fastfip {
namespace cuda {

struct Arguments {
    const int64_t* n;

    int64_t number() { return *n++; }
    void* pointer() { return reinterpret_cast<void*>(*n++); }
    Type type() { return static_cast<Type>(*n++); }

    Map map() {
        Map m = {pointer(), n[0], n[1], n[2], {n[3], n[4], n[5]}};
        n += 6;
        return m;
    }

    Lines lines() {
        Lines x = {pointer(), n[0], n[1], n[2]};
        n += 3;
        return x;
    }

    Sizes sizes() {
        Sizes s = {n[0], n[1], n[2], n[3], n[4], {}, {}, {}, {}, {}, {}};
        n += 5;
        for (int64_t* three : {s.positions, s.kernel, s.step, s.dilation, s.padding, s.size})
            for (int d = 0; d < 3; ++d) three[d] = *n++;
        return s;
    }
};

// Returns what is wrong, or null.
template <class Function>
const char* words(const Function& f) {
    static char said[256];
    try {
        f();
    } catch (const std::exception& error) {
        strncpy(said, error.what(), sizeof(said) - 1);
        return said;
    }
    return nullptr;
}

}  // namespace cuda
}  // namespace fastfip
