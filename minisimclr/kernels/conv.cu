// Patches of images (n, h, w, c) as rows (n oh ow, kh kw c), and back: a block is 32 numbers wide
// and has 8 rows of patches, or pixels, so a warp reads and writes 128 bytes in one piece.
typedef unsigned short bfloat16;  // the first half of a float

__device__ void put(float* out, float x) { *out = x; }
__device__ void put(bfloat16* out, float x) {  // to the nearest, ties to even
    const unsigned bits = __float_as_uint(x);
    *out = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

extern "C" __global__ void round_all(const float* x, bfloat16* out, long long n) {
    const long long i = blockIdx.x * 256LL + threadIdx.x;
    if (i < n) put(out + i, x[i]);
}

template <class T> __device__ void unfold_as(const float* x, T* patches, long long rows,
        int h, int w, int c, int kh, int kw, int sh, int sw, int ph, int pw, int oh, int ow) {
    const long long row = blockIdx.x * 8LL + threadIdx.y;
    if (row >= rows) return;
    int a = row / ow % oh * sh - ph, b = row % ow * sw - pw;  // a pixel of the image, counted on:
    const int right = b + kw, numbers = kh * kw * c;          // divisions take longer than memory
    const float* image = x + row / ow / oh * h * w * c;
    for (int i = threadIdx.x, k = i; i < numbers; i += 32, k += 32) {
        for (; k >= c; k -= c)
            if (++b == right) b -= kw, a++;
        const bool inside = a >= 0 && a < h && b >= 0 && b < w;
        put(patches + row * numbers + i, inside ? image[(a * w + b) * c + k] : 0);
    }
}

extern "C" __global__ void unfold(const float* x, float* patches, long long rows,
        int h, int w, int c, int kh, int kw, int sh, int sw, int ph, int pw, int oh, int ow) {
    unfold_as(x, patches, rows, h, w, c, kh, kw, sh, sw, ph, pw, oh, ow);
}

extern "C" __global__ void unfold_bf16(const float* x, bfloat16* patches, long long rows,
        int h, int w, int c, int kh, int kw, int sh, int sw, int ph, int pw, int oh, int ow) {
    unfold_as(x, patches, rows, h, w, c, kh, kw, sh, sw, ph, pw, oh, ow);
}

// Each pixel sums what its patches hold of it, in one order whatever the launch.
extern "C" __global__ void fold(const float* patches, float* x, long long pixels,
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
