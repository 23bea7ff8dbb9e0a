// The activations of gated MLPs.
#pragma once

__device__ inline float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }
// x/2 (1 + tanh(u)) = x / (1 + e^(-2u)),  u = sqrt(2/pi) (x + 0.044715 x^3)
__device__ inline float gelu_tanh(float x) { return __fdividef(x, 1.0f + __expf(-1.5957691216057308f * (x + 0.044715f * x * x * x))); }
