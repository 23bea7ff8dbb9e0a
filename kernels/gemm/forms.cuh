// What becomes of the sums of a product: numbers of x's type, of float, or, gated, y = f(gate) · up of x's type, where the
// first half of the weight's rows gives the gates and the second the ups.
#pragma once

#include "activations.cuh"

enum Form { kPlain, kFloat, kSilu, kGeluTanh };

__device__ constexpr bool is_gated(Form form) { return form == kSilu || form == kGeluTanh; }
__device__ inline float gated(Form form, float gate, float up) { return (form == kSilu ? silu(gate) : gelu_tanh(gate)) * up; }
