// All parameters in one launch: blockIdx.y says which, the blocks along x share its numbers.
struct Row { float *w; const float *g; float *v; long long size; float decay, eeta; };
#define FOR_EACH(i, n) \
    for (long long i = blockIdx.x * 256 + threadIdx.x; i < (n); i += gridDim.x * 256)

// Each block's share of |w|^2 and |g + decay w|^2: part (parameters, blocks, 2).
extern "C" __global__ void squares(const Row* rows, float* part) {
    __shared__ float sums[2][256];
    const Row p = rows[blockIdx.y];
    float own[2] = {0, 0};
    FOR_EACH(i, p.size) {
        const float w = p.w[i], g = p.g[i] + p.decay * w;
        own[0] += w * w;
        own[1] += g * g;
    }
    for (int k = 0; k < 2; k++) sums[k][threadIdx.x] = own[k];
    for (int half = 128; half; half /= 2) {
        __syncthreads();
        for (int k = 0; k < 2 && threadIdx.x < half; k++)
            sums[k][threadIdx.x] += sums[k][threadIdx.x + half];
    }
    __syncthreads();
    if (threadIdx.x < 2)
        part[2 * (blockIdx.y * gridDim.x + blockIdx.x) + threadIdx.x] = sums[threadIdx.x][0];
}

// LARS, or SGD where eeta is 0; moves nothing if ok points to a 0.
extern "C" __global__ void update(const Row* rows, const float* part, const bool* ok, float* trust,
                                  float lr, float momentum) {
    const Row p = rows[blockIdx.y];
    float sums[2] = {0, 0}, ratio = 1;
    for (int k = 0; p.eeta > 0 && k < 2 * gridDim.x; k++)
        sums[k % 2] += part[2 * blockIdx.y * gridDim.x + k];
    if (sums[0] > 0 && sums[1] > 0) ratio = p.eeta * sqrtf(sums[0]) / sqrtf(sums[1]);
    if (blockIdx.x == 0 && threadIdx.x == 0) trust[blockIdx.y] = ratio;
    if (ok && !*ok) return;
    FOR_EACH(i, p.size) {
        const float v = momentum * p.v[i] + lr * ratio * (p.g[i] + p.decay * p.w[i]);
        p.v[i] = v;
        p.w[i] -= v;
    }
}
