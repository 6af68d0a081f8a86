// The maps of Winograd's method (see winograd.py) for tiles of 4 x 4 outputs: X for x, Y for y and
// gy, W for w and gw. Polynomials are evaluated at 0, P, -P, Q, -Q and infinity.
// A thread holds one channel of one tile in registers; the numbers of a warp lie side by side.
#define UNROLLED _Pragma("unroll")
constexpr double P = 0.625, Q = 1.625, PP = P * P, QQ = Q * Q;
constexpr double R = 1 / (PP * QQ), S = 1 / (2 * PP * (PP - QQ)), T = 1 / (2 * QQ * (QQ - PP));
__constant__ float X[6][6] = {{PP * QQ, 0, -PP - QQ, 0, 1, 0},  // B'
                              {0, -P * QQ, -QQ, P, 1, 0}, {0, P * QQ, -QQ, -P, 1, 0},
                              {0, -Q * PP, -PP, Q, 1, 0}, {0, Q * PP, -PP, -Q, 1, 0},
                              {0, PP * QQ, 0, -PP - QQ, 0, 1}};
__constant__ float Y[6][4] = {{1, 0, 0, 0}, {1, P, PP, P * PP}, {1, -P, PP, -P * PP},  // A
                              {1, Q, QQ, Q * QQ}, {1, -Q, QQ, -Q * QQ}, {0, 0, 0, 1}};
__constant__ float W[6][3] = {{R, 0, 0}, {S, S * P, S * PP}, {S, -S * P, S * PP},  // G
                              {T, T * Q, T * QQ}, {T, -T * Q, T * QQ}, {0, 0, 1}};

// map t map' of tiles t of a x a pixels, one every 4 pixels: out (6 6, tiles, c)
template <int a>
__device__ void take_tile(const float (*map)[a], const float* x, float* out, int numbers,
                          int h, int w, int c, int rows, int columns, int ph, int pw) {
    const int i = blockIdx.x * 256 + threadIdx.x, tile = i / c;
    if (i >= numbers) return;
    const int top = tile / columns % rows * 4 - ph, left = tile % columns * 4 - pw;
    const float* image = x + (long long)(tile / columns / rows) * h * w * c + i % c;
    float wide[a][6] = {};
    UNROLLED for (int j = 0; j < a; j++)
        UNROLLED for (int k = 0; k < a; k++) {
            const int row = top + j, column = left + k;
            const bool inside = row >= 0 && row < h && column >= 0 && column < w;
            const float number = inside ? image[((long long)row * w + column) * c] : 0;
            UNROLLED for (int g = 0; g < 6; g++) wide[j][g] += map[g][k] * number;
        }
    UNROLLED for (int f = 0; f < 6; f++)
        UNROLLED for (int g = 0; g < 6; g++) {
            float sum = 0;
            UNROLLED for (int j = 0; j < a; j++) sum += map[f][j] * wide[j][g];
            out[(6LL * f + g) * numbers + i] = sum;
        }
}

// map' t map of tiles t (6 6, tiles, c): m x m pixels from each, without those outside the image
template <int m>
__device__ void put_tile(const float (*map)[m], const float* tiles, float* y, int numbers,
                         int h, int w, int c, int rows, int columns) {
    const int i = blockIdx.x * 256 + threadIdx.x, tile = i / c;
    if (i >= numbers) return;
    const int top = tile / columns % rows * m, left = tile % columns * m;
    float* image = y + (long long)(tile / columns / rows) * h * w * c + i % c;
    float tall[m][6] = {};
    UNROLLED for (int f = 0; f < 6; f++)
        UNROLLED for (int g = 0; g < 6; g++) {
            const float number = tiles[(6LL * f + g) * numbers + i];
            UNROLLED for (int j = 0; j < m; j++) tall[j][g] += map[f][j] * number;
        }
    UNROLLED for (int j = 0; j < m; j++)
        UNROLLED for (int k = 0; k < m; k++) {
            float sum = 0;
            UNROLLED for (int g = 0; g < 6; g++) sum += tall[j][g] * map[g][k];
            if (top + j < h && left + k < w) image[((long long)(top + j) * w + left + k) * c] = sum;
        }
}

// side of the tiles: 6 for x, 4 for gy or y, 3 for w or gw
extern "C" __global__ void take(const float* x, float* out, int side, int numbers,
                                int h, int w, int c, int rows, int columns, int ph, int pw) {
    if (side == 6) take_tile<6>(X, x, out, numbers, h, w, c, rows, columns, ph, pw);
    if (side == 4) take_tile<4>(Y, x, out, numbers, h, w, c, rows, columns, ph, pw);
    if (side == 3) take_tile<3>(W, x, out, numbers, h, w, c, rows, columns, ph, pw);
}

extern "C" __global__ void put(const float* tiles, float* y, int side, int numbers,
                               int h, int w, int c, int rows, int columns) {
    if (side == 4) put_tile<4>(Y, tiles, y, numbers, h, w, c, rows, columns);
    if (side == 3) put_tile<3>(W, tiles, y, numbers, h, w, c, rows, columns);
}
