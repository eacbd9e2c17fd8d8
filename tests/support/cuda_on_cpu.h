// csrc/cuda/device.h for a CPU: the threads of a block are fibers that take turns, so the kernels themselves run in a test.
// Stricter than a device: an asynchronous copy arrives only when it is waited for (until then its target is NaN), shared memory
// starts as NaN, every access of it is checked, and threads take turns in an order that the caller chooses.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <stdexcept>
#include <vector>

namespace fastfip {
namespace cuda {

#define FASTFIP_DEVICE inline

struct Copy {
    char* to;
    const char* from;
    int size, bytes;
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool done = false;
    std::vector<std::vector<Copy>> groups;  // of copies, oldest first; the last one is open
    int64_t steps = 0;                      // collective operations so far
};

struct Block {
    int threads = 0, current = 0;
    int64_t x = 0, y = 0;
    std::vector<Fiber> fibers;
    ucontext_t scheduler;
    std::vector<char> shared;
    std::vector<int64_t> waits;               // of each fiber: the barrier it stands at
    std::vector<unsigned char> exchange;      // what the lanes of each warp have laid down, 64 bytes each
    std::vector<int> laid;                    // how many lanes of each warp have
    std::vector<int64_t> warp_steps;          // collective operations each warp has done
    std::vector<std::vector<char>> answers;   // of the last one, for each lane
    std::function<void()> body;
    const char* failure = nullptr;
};

inline Block& block() {
    static Block b;
    return b;
}

inline void fail(const char* why) {
    if (!block().failure) block().failure = why;
}

inline void yield() {
    Block& b = block();
    swapcontext(&b.fibers[b.current].context, &b.scheduler);
}

inline int thread_index() { return block().current; }
inline int64_t block_x() { return block().x; }
inline int64_t block_y() { return block().y; }
inline char* shared_memory() { return block().shared.data(); }

inline void check_shared(const void* p, int size) {
    const Block& b = block();
    const char* c = static_cast<const char*>(p);
    if (c < b.shared.data() || c + size > b.shared.data() + b.shared.size()) fail("beyond shared memory");
    if ((c - b.shared.data()) % size != 0) fail("unaligned in shared memory");
}

inline void barrier() {
    Block& b = block();
    const int64_t mine = ++b.waits[b.current];
    for (;;) {
        bool all = true;
        for (int t = 0; t < b.threads; ++t) all = all && (b.waits[t] >= mine);
        if (all || b.failure) return;
        yield();
    }
}

template <int SIZE>
void copy_async(void* shared, const void* global, int bytes) {
    check_shared(shared, SIZE);
    if (bytes > 0 && reinterpret_cast<uintptr_t>(global) % SIZE != 0) fail("unaligned in global memory");
    if (bytes < 0 || bytes > SIZE) fail("copy of more bytes than its size");
    if (block().failure) return;
    memset(shared, 0xff, SIZE);
    block().fibers[block().current].groups.back().push_back({static_cast<char*>(shared), static_cast<const char*>(global), SIZE, bytes});
}

inline void copies_end_group() { block().fibers[block().current].groups.emplace_back(); }

template <int PENDING>
void copies_wait() {
    auto& groups = block().fibers[block().current].groups;
    while (groups.size() > PENDING + 1) {
        for (const Copy& c : groups.front()) {
            memset(c.to, 0, c.size);
            memcpy(c.to, c.from, c.bytes);
        }
        groups.erase(groups.begin());
    }
}

// Every lane of the warp brings `in`; the last one computes all answers from what they brought.
template <class In, class Out, class Compute>
Out together(const In& in, Compute compute) {
    static_assert(sizeof(In) <= 64 && sizeof(Out) <= 64, "fits the exchange");
    Block& b = block();
    const int me = b.current, warp = me / 32, lane = me % 32;
    memcpy(&b.exchange[me * 64], &in, sizeof(In));
    const int64_t step = ++b.fibers[me].steps;
    if (++b.laid[warp] == 32) {
        In all[32];
        Out results[32];
        for (int l = 0; l < 32; ++l) memcpy(&all[l], &b.exchange[(warp * 32 + l) * 64], sizeof(In));
        compute(all, results);
        for (int l = 0; l < 32; ++l) memcpy(b.answers[warp].data() + l * 64, &results[l], sizeof(Out));
        b.laid[warp] = 0;
        ++b.warp_steps[warp];
    }
    while (b.warp_steps[warp] < step && !b.failure) yield();
    Out mine = {};
    if (!b.failure) memcpy(&mine, b.answers[warp].data() + lane * 64, sizeof(Out));
    return mine;
}

struct Four {
    uint32_t r[4];
};

template <bool TRANSPOSED>
void load_matrices(uint32_t (&r)[4], const void* row) {
    check_shared(row, 16);
    const Four four = together<const void*, Four>(row, [](const void* const* rows, Four* out) {
        for (int lane = 0; lane < 32; ++lane)
            for (int m = 0; m < 4; ++m) {
                uint16_t pair[2];
                for (int e = 0; e < 2; ++e) {
                    const int major = lane / 4, minor = lane % 4 * 2 + e;
                    const int at_row = TRANSPOSED ? minor : major, at_column = TRANSPOSED ? major : minor;
                    pair[e] = static_cast<const uint16_t*>(rows[m * 8 + at_row])[at_column];
                }
                memcpy(&out[lane].r[m], pair, 4);
            }
    });
    memcpy(r, four.r, sizeof(r));
}

inline float half_value(uint16_t bits, bool bfloat16) {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16;
    uint32_t word = uint32_t(bits) << 16;
    float x;
    if (!bfloat16) {
        word = sign | (((bits & 0x7c00) == 0x7c00) ? 0x7f800000u | uint32_t(bits & 0x3ff) << 13 : uint32_t(bits & 0x7fff) << 13);
        memcpy(&x, &word, 4);
        return (bits & 0x7c00) == 0x7c00 ? x : x * 0x1p112f;
    }
    memcpy(&x, &word, 4);
    return x;
}

struct Product {
    uint32_t a[4], b[2];
    float c[4];
};

struct FourFloats {
    float c[4];
};

// The layouts of PTX's mma.m16n8k16 (16 bits) and mma.m16n8k8 (TF32), as its manual gives them.
template <int KIND>  // 0 float16, 1 bfloat16, 2 TF32
void multiply_16x8(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Product mine;
    memcpy(mine.a, a, 16);
    mine.b[0] = b0, mine.b[1] = b1;
    memcpy(mine.c, c, 16);
    const FourFloats four = together<Product, FourFloats>(mine, [](const Product* in, FourFloats* out) {
        constexpr int K = KIND == 2 ? 8 : 16, EACH = KIND == 2 ? 1 : 2;
        float left[16][K], right[K][8];
        auto value = [](uint32_t word, int e) {
            float x;
            if (KIND == 2) {
                if (word & 0x1fff) fail("not a TF32 number");
                memcpy(&x, &word, 4);
                return x;
            }
            return half_value(static_cast<uint16_t>(word >> (16 * e)), KIND == 1);
        };
        for (int lane = 0; lane < 32; ++lane)
            for (int e = 0; e < EACH; ++e) {
                for (int r = 0; r < 4; ++r)
                    left[lane / 4 + (r % 2) * 8][lane % 4 * EACH + e + (r / 2) * K / 2] = value(in[lane].a[r], e);
                for (int r = 0; r < 2; ++r) right[lane % 4 * EACH + e + r * K / 2][lane / 4] = value(in[lane].b[r], e);
            }
        for (int lane = 0; lane < 32; ++lane)
            for (int r = 0; r < 4; ++r) {
                double sum = in[lane].c[r];
                for (int k = 0; k < K; ++k) sum += double(left[lane / 4 + r / 2 * 8][k]) * right[k][lane % 4 * 2 + r % 2];
                out[lane].c[r] = static_cast<float>(sum);
            }
    });
    memcpy(c, four.c, 16);
}

template <bool BFLOAT16>
void multiply_16bit(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_16x8<BFLOAT16 ? 1 : 0>(c, a, b0, b1);
}

inline void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { multiply_16x8<2>(c, a, b0, b1); }

struct DoubleProduct {
    double a, b, c[2];
};

struct TwoDoubles {
    double c[2];
};

inline void multiply_f64(double& c0, double& c1, double a, double b) {
    const TwoDoubles two = together<DoubleProduct, TwoDoubles>({a, b, {c0, c1}}, [](const DoubleProduct* in, TwoDoubles* out) {
        for (int lane = 0; lane < 32; ++lane)
            for (int r = 0; r < 2; ++r) {
                double sum = in[lane].c[r];
                for (int k = 0; k < 4; ++k) sum += in[lane / 4 * 4 + k].a * in[(lane % 4 * 2 + r) * 4 + k].b;
                out[lane].c[r] = sum;
            }
    });
    c0 = two.c[0], c1 = two.c[1];
}

inline uint32_t to_tf32(float x) {
    uint32_t word;
    memcpy(&word, &x, 4);
    if ((word & 0x7f800000) != 0x7f800000) word += 0x1000;  // to nearest, ties away from zero
    return word & ~0x1fffu;
}

inline float as_float(uint32_t word) {
    float x;
    memcpy(&x, &word, 4);
    return x;
}

inline float float16_value(uint16_t bits) { return half_value(bits, false); }

template <class T>
T of_other_lane(T x, int mask) {
    struct Asked {
        T x;
        int mask;
    };
    return together<Asked, T>({x, mask}, [](const Asked* in, T* out) {
        for (int lane = 0; lane < 32; ++lane) out[lane] = in[lane ^ in[lane].mask].x;
    });
}

// Runs one block. `order`: 0 threads take turns upwards, 1 downwards, 2 every one as far as it gets, from the middle on, 3 every
// warp as far as it gets before the next one begins, which shows where a barrier is missing.
inline void enter() {
    Block& b = block();
    b.body();
    b.fibers[b.current].done = true;
    ++b.waits[b.current] += int64_t(1) << 40;
    yield();
}

inline void run_block(int threads, int bytes, int64_t x, int64_t y, int order, const std::function<void()>& body) {
    Block& b = block();
    b.threads = threads, b.x = x, b.y = y, b.body = body, b.failure = nullptr;
    if (static_cast<int>(b.fibers.size()) < threads) b.fibers.resize(threads);
    b.shared.assign(bytes, char(0xff));
    b.waits.assign(threads, 0);
    b.exchange.assign(threads * 64, 0);
    b.laid.assign(threads / 32, 0);
    b.warp_steps.assign(threads / 32, 0);
    b.answers.assign(threads / 32, std::vector<char>(32 * 64));
    for (int t = 0; t < threads; ++t) {
        Fiber& f = b.fibers[t];
        f.done = false, f.steps = 0, f.groups.assign(1, {});
        f.stack.resize(32 * 1024);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data();
        f.context.uc_stack.ss_size = f.stack.size();
        f.context.uc_link = &b.scheduler;
        makecontext(&f.context, enter, 0);
    }
    int left = threads;
    auto turn = [&](int t) {
        if (b.fibers[t].done) return;
        b.current = t;
        swapcontext(&b.scheduler, &b.fibers[t].context);
        if (b.fibers[t].done) --left;
    };
    auto done_by = [&](int warp) {
        int64_t steps = 0;
        for (int t = warp * 32; t < warp * 32 + 32; ++t) steps += b.fibers[t].steps + b.waits[t] + b.fibers[t].done;
        return steps;
    };
    while (left > 0) {
        if (order == 3)
            for (int warp = 0; warp < threads / 32; ++warp)
                for (int64_t before = -1; before != done_by(warp) && !b.failure;) {
                    before = done_by(warp);
                    for (int t = warp * 32; t < warp * 32 + 32; ++t) turn(t);
                }
        else
            for (int i = 0; i < threads; ++i) turn(order == 0 ? i : order == 1 ? threads - 1 - i : (i * 37 + threads / 2) % threads);
        if (b.failure) throw std::runtime_error(b.failure);
    }
}

}  // namespace cuda
}  // namespace fastfip
