#include "real.cuh"
// Maxima over windows of images (n, h, w, c), and the way back. A block is 32 channels wide and
// covers 8 windows, or pixels. kh ... ow as in conv.cu; t and l: padding at the top and the left.
extern "C" __global__ void max_pool(const REAL* x, unsigned char* argmax, REAL* y,
        int windows, int h, int w, int c, int kh, int kw, int sh, int sw, int t, int l,
        int oh, int ow) {
    const int window = blockIdx.x * 8 + threadIdx.y;
    if (window >= windows) return;
    const int top = window / ow % oh * sh - t, left = window % ow * sw - l;
    const REAL* image = x + (long long)(window / ow / oh) * h * w * c;
    for (int k = threadIdx.x; k < c; k += 32) {
        float best = __int_as_float(0xff800000);  // -inf
        int winner = 0;
        for (int a = max(0, -top); a < kh && top + a < h; a++)
            for (int b = max(0, -left); b < kw && left + b < w; b++) {
                const float v = image[((top + a) * w + left + b) * c + k];
                if (v > best || v != v) best = v, winner = a * kw + b;
            }
        y[(long long)window * c + k] = best;
        argmax[(long long)window * c + k] = winner;
    }
}

// Each pixel sums the gradients of the windows whose maximum it was, as fold does in conv.cu.
extern "C" __global__ void max_pool_gradient(const REAL* gy, const unsigned char* argmax,
        REAL* gx, int pixels, int h, int w, int c, int kh, int kw, int sh, int sw,
        int t, int l, int oh, int ow) {
    const int pixel = blockIdx.x * 8 + threadIdx.y;
    if (pixel >= pixels) return;
    const int row = pixel / w % h + t, column = pixel % w + l;
    const long long first = (long long)(pixel / w / h) * oh * ow;  // window of this image
    for (int k = threadIdx.x; k < c; k += 32) {
        float sum = 0;
        for (int a = row % sh, i = row / sh; a < kh && i >= 0; a += sh, i--)
            for (int b = column % sw, j = column / sw; b < kw && j >= 0; b += sw, j--) {
                const long long from = (first + i * ow + j) * c + k;
                if (i < oh && j < ow && argmax[from] == a * kw + b) sum += gy[from];
            }
        gx[(long long)pixel * c + k] = sum;
    }
}
