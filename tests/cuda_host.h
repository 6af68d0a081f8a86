// Runs the text of a .cu file on the CPU, block after block, with a fiber for each thread.
//
// A barrier gives way to the next thread, in an order that the caller chooses; so a kernel that
// lacks a barrier gives another result in another order. Shared memory is filled with NaN before
// each block. A barrier that not all threads of a block reach is reported, and so are accesses out
// of bounds if the file is compiled with -fsanitize=address.
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
enum State { READY, WAITING, DONE };
struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(STACK);
    State state;
    int line, passed;  // the barrier it waits at, and how many it has passed
};
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static std::function<void()> body;
static size_t current;
static int ignored_line = 0;
static char message[200];

static void barrier(int line) {
    if (line == ignored_line) return;
    Fiber& f = fibers[current];
    f.state = WAITING;
    f.line = line;
    f.passed++;
    swapcontext(&f.context, &scheduler);
}

static void enter() {
    body();
    fibers[current].state = DONE;
}

static dim3 place(size_t i, dim3 of) {
    return {unsigned(i % of.x), unsigned(i / of.x % of.y), unsigned(i / of.x / of.y)};
}

// The i-th of n in an order: 0 ascending, 1 descending, 2 with a stride.
static size_t turn(size_t i, size_t n, int order) {
    if (order == 0) return i;
    if (order == 1) return n - 1 - i;
    size_t stride = n / 2 | 1;
    while (std::gcd(stride, n) != 1) stride += 2;
    return i * stride % n;
}

static bool run_block(int order) {
    const size_t n = fibers.size();
    if (__start_shared) memset(__start_shared, 0xff, __stop_shared - __start_shared);
    for (Fiber& f : fibers) {
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data();
        f.context.uc_stack.ss_size = STACK;
        f.context.uc_link = &scheduler;
        f.state = READY;
        f.passed = 0;
        makecontext(&f.context, enter, 0);
    }
    for (size_t waiting = n; waiting;) {
        for (size_t i = 0; i < n; i++) {
            current = turn(i, n, order);
            if (fibers[current].state != READY) continue;
            threadIdx = place(current, blockDim);
            swapcontext(&scheduler, &fibers[current].context);
        }
        waiting = 0;
        const Fiber* first = nullptr;
        for (Fiber& f : fibers)
            if (f.state == WAITING) {
                first = first ? first : &f;
                if (f.line != first->line || f.passed != first->passed) {
                    snprintf(message, sizeof message, "threads wait at barriers of lines %d and %d",
                             first->line, f.line);
                    return false;
                }
                waiting++;
            }
        if (waiting && waiting < n) {
            snprintf(message, sizeof message, "%zu of %zu threads reach the barrier of line %d",
                     waiting, n, first->line);
            return false;
        }
        for (Fiber& f : fibers) f.state = waiting ? READY : DONE;
    }
    return true;
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
const char* launch(void (*kernel)(A...), const unsigned* shape, int order, int ignored, void** args) {
    const Flush flush;
    gridDim = {shape[0], shape[1], shape[2]};
    blockDim = {shape[3], shape[4], shape[5]};
    ignored_line = ignored;
    fibers.resize(size_t(blockDim.x) * blockDim.y * blockDim.z);
    prepare(kernel, args, std::index_sequence_for<A...>());
    const size_t blocks = size_t(gridDim.x) * gridDim.y * gridDim.z;
    for (size_t i = 0; i < blocks; i++) {
        blockIdx = place(turn(i, blocks, order), gridDim);
        if (!run_block(order)) return message;
    }
    return nullptr;
}
}  // namespace host
