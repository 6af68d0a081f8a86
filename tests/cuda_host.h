// Runs the text of a .cu file on the CPU, block after block, with a fiber for each thread that waits.
//
// A fiber takes thread after thread, in an order that the caller chooses, until one waits at a
// barrier: then the next fiber goes on. So a kernel that lacks a barrier gives another result in
// another order. Shared memory is filled with NaN before each block. A barrier that not all threads
// of a block reach is reported, and so are accesses out of bounds if the file is compiled with
// -fsanitize=address.
// Subnormal numbers are 0, as in CuPy (-ftz=true); products are added without rounding them first
// where the processor can do so, as a GPU does.
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>

#ifdef __SSE__
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <deque>
#include <functional>
#include <numeric>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __constant__ static const
#define __shared__ static __attribute__((section("shared")))
#define __syncthreads() host::barrier(__LINE__)
static unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}
static float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
static float __int_as_float(int bits) { return __uint_as_float(bits); }
using std::max;
using std::min;

struct dim3 {
    unsigned x, y, z;
};
static dim3 threadIdx, blockIdx, blockDim, gridDim;

extern char __start_shared[] __attribute__((weak)), __stop_shared[] __attribute__((weak));

namespace host {
const size_t STACK = 1 << 16;
struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(STACK);
    size_t thread;
    bool waits;
    int line, passed;  // the barrier it waits at, and how many it has passed
};
static std::deque<Fiber> fibers;  // which stay where they are as more are made
static ucontext_t scheduler;
static std::function<void()> body;
static size_t current, started, threads;
static int ignored_line = 0, order;
static char message[200];

static dim3 place(size_t i, dim3 of) {
    return {unsigned(i % of.x), unsigned(i / of.x % of.y), unsigned(i / of.x / of.y)};
}

// The i-th of n, by `order`: 0 ascending, 1 descending, 2 with a stride.
static size_t turn(size_t i, size_t n) {
    if (order == 0) return i;
    if (order == 1) return n - 1 - i;
    size_t stride = n / 2 | 1;
    while (std::gcd(stride, n) != 1) stride += 2;
    return i * stride % n;
}

static void barrier(int line) {
    if (line == ignored_line) return;
    Fiber& f = fibers[current];
    f.waits = true;
    f.line = line;
    f.passed++;
    swapcontext(&f.context, &scheduler);
}

static void take_turns() {  // thread after thread, until one waits
    while (started < threads) {
        Fiber& f = fibers[current];
        f.thread = turn(started++, threads);
        f.passed = 0;
        threadIdx = place(f.thread, blockDim);
        body();
    }
}

static void start(size_t i) {
    if (i == fibers.size()) fibers.emplace_back();
    Fiber& f = fibers[current = i];
    f.waits = false;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = STACK;
    f.context.uc_link = &scheduler;
    makecontext(&f.context, take_turns, 0);
    swapcontext(&scheduler, &f.context);
}

static bool run_block() {
    if (__start_shared) memset(__start_shared, 0xff, __stop_shared - __start_shared);
    size_t n = 0;  // fibers
    for (started = 0; started < threads;) start(n++);
    while (true) {
        size_t waiting = 0;
        const Fiber* first = nullptr;
        for (size_t i = 0; i < n; i++) {
            const Fiber& f = fibers[i];
            if (!f.waits) continue;
            first = first ? first : &f;
            if (f.line != first->line || f.passed != first->passed) {
                snprintf(message, sizeof message, "threads wait at barriers of lines %d and %d",
                         first->line, f.line);
                return false;
            }
            waiting++;
        }
        if (!waiting) return true;
        if (waiting < threads) {
            snprintf(message, sizeof message, "%zu of %zu threads reach the barrier of line %d",
                     waiting, threads, first->line);
            return false;
        }
        for (current = 0; current < n; current++) {
            Fiber& f = fibers[current];
            f.waits = false;
            threadIdx = place(f.thread, blockDim);
            swapcontext(&scheduler, &f.context);
        }
    }
}

struct Flush {  // flushes subnormal numbers to 0 while it lives
#ifdef __SSE__
    const unsigned before = _mm_getcsr();
    Flush() { _mm_setcsr(before | 0x8040); }
    ~Flush() { _mm_setcsr(before); }
#endif
};

template <class... A, size_t... I>
void prepare(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
    body = [=] { kernel(*static_cast<A*>(args[I])...); };
}

template <class... A>
const char* launch(void (*kernel)(A...), const unsigned* shape, int order_of_threads, int ignored,
                   void** args) {
    const Flush flush;
    gridDim = {shape[0], shape[1], shape[2]};
    blockDim = {shape[3], shape[4], shape[5]};
    ignored_line = ignored;
    order = order_of_threads;
    threads = size_t(blockDim.x) * blockDim.y * blockDim.z;
    prepare(kernel, args, std::index_sequence_for<A...>());
    const size_t blocks = size_t(gridDim.x) * gridDim.y * gridDim.z;
    for (size_t i = 0; i < blocks; i++) {
        blockIdx = place(turn(i, blocks), gridDim);
        if (!run_block()) return message;
    }
    return nullptr;
}
}  // namespace host
