// Both views of every image in one launch, one block per view: crop, colours, grey. Each thread has
// its own pixels, so only the mean that contrast needs has barriers.
struct View { float left, top, width, height, factors[4]; int orders[4], flip, grey; };
enum { BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY };
#define OWN(p) for (int p = threadIdx.x; p < size * size; p += 256)
#define CHANNEL for (int k = 0; k < 3; k++)
__device__ float cut(float v) { return v < 0 ? 0 : v > 1 ? 1 : v; }

struct Triangle {  // of n input pixels on one axis, those under output pixel i, and their weights
    float centre, reach;
    int first, last;
    __device__ Triangle(float start, float length, int i, int size, int n) {
        centre = start + length / size * (i + 0.5f);
        reach = fmaxf(length / size, 1);
        first = max(0, (int)ceilf(centre - reach - 0.5f));
        last = min(n - 1, (int)floorf(centre + reach - 0.5f));
    }
    __device__ float weight(int i) { return fmaxf(0, 1 - fabsf(i + 0.5f - centre) / reach); }
};

__device__ void crop(View v, const unsigned char* image, int h, int w, float* y, int size) {
    OWN(p) {
        const int column = v.flip ? size - 1 - p % size : p % size;
        Triangle down(v.top, v.height, p / size, size, h);
        Triangle across(v.left, v.width, column, size, w);
        float total = 0, sum[3] = {0, 0, 0};
        for (int i = down.first; i <= down.last; i++)
            for (int j = across.first; j <= across.last; j++) {
                const float share = down.weight(i) * across.weight(j);
                total += share;
                CHANNEL sum[k] += share * image[(i * w + j) * 3 + k];
            }
        CHANNEL y[3 * p + k] = sum[k] / (255 * total);
    }
}

__device__ void mean_of(const float* y, int size, float* mean) {
    __shared__ float sums[3][256];
    CHANNEL sums[k][threadIdx.x] = 0;
    OWN(p) CHANNEL sums[k][threadIdx.x] += y[3 * p + k];
    for (int half = 128; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) CHANNEL sums[k][threadIdx.x] += sums[k][threadIdx.x + half];
    }
    __syncthreads();
    CHANNEL mean[k] = sums[k][0] / (size * size);
}

__device__ void adjust(float* x, int kind, float factor, const float* mean) {
    const float top = fmaxf(x[0], fmaxf(x[1], x[2])), spread = top - fminf(x[0], fminf(x[1], x[2]));
    float unit = spread > 0 ? spread : 1, luma = 0.299f * x[0] + 0.587f * x[1] + 0.114f * x[2];
    const float sixths = top == x[0] ? (x[1] - x[2]) / unit
                       : top == x[1] ? 2 + (x[2] - x[0]) / unit : 4 + (x[0] - x[1]) / unit;
    CHANNEL {
        const float away = sixths + 6 * factor - 2 * k;
        if (kind == BRIGHTNESS) x[k] *= factor;
        if (kind == CONTRAST) x[k] = mean[k] + (x[k] - mean[k]) * factor;
        if (kind == SATURATION) x[k] = top - (top - x[k]) * fminf(factor, top / unit);
        if (kind == HUE) x[k] = top - spread * cut(fabsf(away - 6 * rintf(away / 6)) - 1);
        if (kind == GREY) x[k] = luma;
        x[k] = cut(x[k]);
    }
}

extern "C" __global__ void two_views(const unsigned char* images, const View* views, float* out,
                                     int n, int height, int width, int size) {
    const View v = views[blockIdx.x];
    float *y = out + blockIdx.x * 3LL * size * size, mean[3] = {0, 0, 0};
    crop(v, images + blockIdx.x % n * 3LL * height * width, height, width, y, size);
    for (int place = 0; place < 4; place++) {
        const int kind = v.orders[place];
        if (kind == CONTRAST) mean_of(y, size, mean);
        OWN(p) adjust(y + 3 * p, kind, v.factors[kind], mean);
    }
    if (v.grey) OWN(p) adjust(y + 3 * p, GREY, 0, mean);
}
