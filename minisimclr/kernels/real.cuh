// REAL is the type of activations: float, or bfloat16, the upper half of a float. In a kernel that
// only copies it may also be double, two or four of them at once.
struct bfloat16 {
    unsigned short bits;
    __device__ operator float() const { return __uint_as_float((unsigned)bits << 16); }
    __device__ bfloat16& operator=(float x) {  // to the nearest, ties to even
        const unsigned all = __float_as_uint(x);
        bits = x != x ? 0x7fc0 : (all + 0x7fff + (all >> 16 & 1)) >> 16;
        return *this;
    }
};
#ifndef REAL
#define REAL float
#endif
