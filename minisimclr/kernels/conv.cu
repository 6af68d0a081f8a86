#include "real.cuh"
// Patches of images (n, h, w, c) as rows (n oh ow, kh kw c), and back: a block is 32 numbers wide
// and has 8 rows of patches, or pixels, so a warp reads and writes 128 bytes in one piece.
extern "C" __global__ void unfold(const REAL* x, REAL* patches, long long rows,
        int h, int w, int c, int kh, int kw, int sh, int sw, int ph, int pw, int oh, int ow) {
    const long long row = blockIdx.x * 8LL + threadIdx.y;
    if (row >= rows) return;
    int a = row / ow % oh * sh - ph, b = row % ow * sw - pw;  // a pixel of the image, counted on:
    const int right = b + kw, numbers = kh * kw * c;          // divisions take longer than memory
    const REAL zero = {}, *image = x + row / ow / oh * h * w * c;
    for (int i = threadIdx.x, k = i; i < numbers; i += 32, k += 32) {
        for (; k >= c; k -= c)
            if (++b == right) b -= kw, a++;
        const bool inside = a >= 0 && a < h && b >= 0 && b < w;
        patches[row * numbers + i] = inside ? image[(a * w + b) * c + k] : zero;
    }
}

// Each pixel sums what its patches hold of it, in one order whatever the launch.
extern "C" __global__ void fold(const REAL* patches, REAL* x, long long pixels,
        int h, int w, int c, int kh, int kw, int sh, int sw, int ph, int pw, int oh, int ow) {
    const long long pixel = blockIdx.x * 8LL + threadIdx.y;
    if (pixel >= pixels) return;
    const int row = pixel / w % h + ph, column = pixel % w + pw;
    const long long first = pixel / w / h * oh * ow;  // patch of this image
    for (int k = threadIdx.x; k < c; k += 32) {
        float sum = 0;
        for (int a = row % sh; a < kh && a <= row; a += sh)
            for (int b = column % sw; b < kw && b <= column; b += sw) {
                const int i = (row - a) / sh, j = (column - b) / sw;
                if (i < oh && j < ow)
                    sum += patches[(((first + i * ow + j) * kh + a) * kw + b) * c + k];
            }
        x[pixel * c + k] = sum;
    }
}
