#include "real.cuh"
// Batch norm of x (rows, channels). A block is 32 channels wide and 8 rows high, and has a tile of
// rows to itself: each thread walks down one channel, so a warp reads 128 bytes in one piece.
struct Walk {
    long long c, top, i, end, step;
    __device__ Walk(long long rows, int channels, int tile) {
        c = blockIdx.x * 32 + threadIdx.x;
        top = (long long)blockIdx.y * tile;
        i = (top + threadIdx.y) * channels + c;
        end = c < channels ? min(top + tile, rows) * channels : 0;
        step = 8LL * channels;
    }
};

struct Moments { float n, mean, m2; };  // or two sums
__device__ Moments plus(Moments a, Moments b) { return {0, a.mean + b.mean, a.m2 + b.m2}; }
__device__ Moments merge(Moments a, Moments b) {  // Chan, Golub & LeVeque 1979
    const float n = a.n + b.n, delta = b.mean - a.mean, share = n > 0 ? b.n / n : 0;
    return {n, a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.n * share};
}

// Per tile and channel, part (tiles, 2, channels): mean and M2 of x if gy is null, else the sums of
// g and g (x - mean). g is gy; with y, it is gy where y > 0, and is written to g_out.
extern "C" __global__ void tile_sums(const REAL* __restrict__ x, const REAL* __restrict__ gy,
                                     const REAL* __restrict__ y, REAL* __restrict__ g_out,
                                     const float* mean, float* part,
                                     long long rows, int channels, int tile) {
    __shared__ float lanes[2][8][32];
    Walk w(rows, channels, tile);
    const bool inside = w.c < channels;
    const float near = !inside ? 0 : gy ? mean[w.c] : x[w.top * channels + w.c];
    float sums[2] = {0, 0};
    for (; w.i < w.end; w.i += w.step) {
        const float d = x[w.i] - near, g = !gy ? d : y ? gy[w.i] * (y[w.i] > 0) : gy[w.i];
        if (y) g_out[w.i] = g;
        sums[0] += g;
        sums[1] += g * d;
    }
    for (int k = 0; k < 2; k++) lanes[k][threadIdx.y][threadIdx.x] = sums[k];
    __syncthreads();
    if (threadIdx.y || !inside) return;
    for (int k = 0; k < 2; k++)
        for (int lane = 1; lane < 8; lane++) sums[k] += lanes[k][lane][threadIdx.x];
    if (!gy) {  // from sums about the tile's first row to mean and M2
        const float n = min(w.top + tile, rows) - w.top;
        sums[1] -= sums[0] * sums[0] / n;
        sums[0] = near + sums[0] / n;
    }
    for (int k = 0; k < 2; k++) part[(2LL * blockIdx.y + k) * channels + w.c] = sums[k];
}

// Over all tiles: mean and variance; or, given the variance, the sums of g and g x^. Few blocks do
// all the work, so they are 32 rows high: each thread then waits for few numbers to merge.
extern "C" __global__ void merge_tiles(const float* part, const float* variance, float eps,
                                       float* first, float* second,
                                       long long rows, int channels, int tile) {
    __shared__ Moments lanes[32][32];
    const int c = blockIdx.x * 32 + threadIdx.x;
    Moments all = {0, 0, 0};
    for (long long t = threadIdx.y; t * tile < rows && c < channels; t += 32) {
        const float n = min(rows - t * tile, (long long)tile);
        const Moments one = {n, part[2 * t * channels + c], part[(2 * t + 1) * channels + c]};
        all = variance ? plus(all, one) : merge(all, one);
    }
    lanes[threadIdx.y][threadIdx.x] = all;
    __syncthreads();
    if (threadIdx.y || c >= channels) return;
    for (int lane = 1; lane < 32; lane++) {
        const Moments one = lanes[lane][threadIdx.x];
        all = variance ? plus(all, one) : merge(all, one);
    }
    first[c] = all.mean;
    second[c] = variance ? all.m2 / sqrtf(variance[c] + eps) : all.m2 / rows;
}

extern "C" __global__ void update_running(float* mean, float* variance, const float* batch_mean,
    const float* batch_variance, int channels, float momentum, float unbiased) {
    const int c = blockIdx.x * 256 + threadIdx.x;
    if (c >= channels) return;
    const float m = momentum == 1 ? 0 : mean[c], v = momentum == 1 ? 0 : variance[c];
    mean[c] = m + momentum * (batch_mean[c] - m);
    variance[c] = v + momentum * (batch_variance[c] * unbiased - v);
}

// out = scale (x - near) + shift + of_g g; g may be absent. Four rows are read before the first is
// written; as out may be g, the compiler must not do that by itself.
__device__ void apply(Walk w, const REAL* x, float near, float scale, float shift,
                      const REAL* g, float of_g, int relu, REAL* out) {
    for (; w.i < w.end; w.i += 4 * w.step) {
        float v[4];
        for (int k = 0; k < 4; k++) {
            const long long i = w.i + k * w.step < w.end ? w.i + k * w.step : w.i;
            v[k] = scale * (x[i] - near) + shift;
            if (g) v[k] += of_g * g[i];
        }
        for (int k = 0; k < 4; k++)
            if (w.i + k * w.step < w.end) out[w.i + k * w.step] = relu && v[k] < 0 ? 0 : v[k];
    }
}

extern "C" __global__ void scale_shift(const REAL* x, const float* mean, const float* variance,
                                       float eps, const float* gamma, const float* beta,
                                       const REAL* residual, int relu,
                                       REAL* out, long long rows, int channels, int tile) {
    Walk w(rows, channels, tile);
    if (w.c >= channels) return;
    const float scale = gamma[w.c] / sqrtf(variance[w.c] + eps);
    apply(w, x, mean[w.c], scale, beta[w.c], residual, 1, relu, out);
}

extern "C" __global__ void input_gradient(const REAL* g, const REAL* x, const float* mean,
                                          const float* variance, float eps, const float* gamma,
                                          const float* sum_g, const float* sum_gxhat, float count,
                                          REAL* out, long long rows, int channels, int tile) {
    Walk w(rows, channels, tile);
    if (w.c >= channels) return;
    const float inv_std = 1 / sqrtf(variance[w.c] + eps), scale = gamma[w.c] * inv_std;
    const float of_mean = -scale / count * sum_g[w.c], of_std = -scale / count * sum_gxhat[w.c];
    apply(w, x, mean[w.c], of_std * inv_std, of_mean, g, scale, 0, out);
}
