#include "real.cuh"
// Patches of images (n, h, w, c) as rows (n oh ow, kh kw c), and back. A block is 32 numbers wide
// and covers 8 patches, or pixels, so a warp reads and writes memory in one piece.
extern "C" __global__ void unfold(const REAL* x, REAL* patches, int rows,
        int h, int w, int c, int kh, int kw, int sh, int sw, int ph, int pw, int oh, int ow) {
    const int row = blockIdx.x * 8 + threadIdx.y;
    if (row >= rows) return;
    int a = row / ow % oh * sh - ph, b = row % ow * sw - pw;  // a pixel of the image, by counting:
    const int right = b + kw, numbers = kh * kw * c;          // dividing takes longer than memory
    const REAL zero = {}, *image = x + (long long)(row / ow / oh) * h * w * c;
    patches += (long long)row * numbers;
    for (int i = threadIdx.x, k = i; i < numbers; i += 32, k += 32) {
        for (; k >= c; k -= c)
            if (++b == right) b -= kw, a++;
        const bool inside = a >= 0 && a < h && b >= 0 && b < w;
        patches[i] = inside ? image[(a * w + b) * c + k] : zero;
    }
}

// Each pixel sums its own copies in the patches, in the same order for every launch: it is number
// (a, b) of patch (i, j) where i sh + a and j sw + b are its row and column.
extern "C" __global__ void fold(const REAL* patches, REAL* x, int pixels,
        int h, int w, int c, int kh, int kw, int sh, int sw, int ph, int pw, int oh, int ow) {
    const int pixel = blockIdx.x * 8 + threadIdx.y;
    if (pixel >= pixels) return;
    const int row = pixel / w % h + ph, column = pixel % w + pw;
    patches += (long long)(pixel / w / h) * oh * ow * kh * kw * c;  // those of this image
    for (int k = threadIdx.x; k < c; k += 32) {
        float sum = 0;
        for (int a = row % sh, i = row / sh; a < kh && i >= 0; a += sh, i--)
            for (int b = column % sw, j = column / sw; b < kw && j >= 0; b += sw, j--)
                if (i < oh && j < ow) sum += patches[(((i * ow + j) * kh + a) * kw + b) * c + k];
        x[(long long)pixel * c + k] = sum;
    }
}
