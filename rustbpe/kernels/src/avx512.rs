//! Dot products of bfloat16 pairs with AVX512-BF16.
//!
//! The functions are inlined into one that has the target features, see [`Isa`](crate::Isa); calling them needs a CPU
//! with AVX-512 F, BW, DQ, VL and BF16.

use std::arch::x86_64::*;

use crate::element::Bf16;
use crate::matmul::{MicroKernel, prefetch_rows};
use crate::simd::LANES;

/// 2 * LANES weights from `p` on.
///
/// # Safety
/// `p` must be valid for reads of 2 * LANES weights, and the CPU must have AVX-512 F.
#[inline(always)]
unsafe fn load(p: *const Bf16) -> __m512bh {
    // SAFETY: the caller guarantees the 64 bytes and the instructions; both types are 64 bytes without padding.
    unsafe { std::mem::transmute(_mm512_loadu_si512(p.cast())) }
}

/// bfloat16 weights with bfloat16 vectors, in steps of 2 * LANES.
pub(crate) struct Bf16Dot;

impl MicroKernel for Bf16Dot {
    type Weight = Bf16;
    type Value = Bf16;
    const ONE_ROW: bool = true;
    const WIDE: bool = true;

    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    unsafe fn block<const V: usize, const O: usize>(w: *const Bf16, x: *const Bf16, n_in: usize) -> [[f32; O]; V] {
        // SAFETY: n_in is a multiple of 2 * LANES, so i + 2 * LANES <= n_in; the caller guarantees O rows, V vectors
        // and the instructions. Stores go to `products`: 16 floats if it has at least 4 rows of 4, else 4 to a row of 4.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); O]; V];
            for i in (0..n_in).step_by(2 * LANES) {
                prefetch_rows::<Bf16, O>(w, n_in, i, 2 * LANES);
                let mut rows = [std::mem::transmute::<__m512, __m512bh>(_mm512_setzero_ps()); O];
                for o in 0..O {
                    rows[o] = load(w.add(o * n_in + i));
                }
                for v in 0..V {
                    let x = load(x.add(v * n_in + i));
                    for o in 0..O {
                        sums[v][o] = _mm512_dpbf16_ps(sums[v][o], rows[o], x);
                    }
                }
            }
            let mut products = [[0.0; O]; V];
            if O == 4 {
                let mut quarters = [_mm512_setzero_ps(); V];
                for v in 0..V {
                    quarters[v] = sum_quarters([sums[v][0], sums[v][1], sums[v][2], sums[v][3]]);
                }
                let mut first = 0;
                if V >= 4 {
                    let four = sum_halves_of_four([quarters[0], quarters[1], quarters[2], quarters[3]]);
                    _mm512_storeu_ps(products.as_mut_ptr().cast(), four);
                    first = 4;
                }
                for v in first..V {
                    _mm_storeu_ps(products[v].as_mut_ptr(), sum_halves(quarters[v]));
                }
            } else {
                for v in 0..V {
                    for o in 0..O {
                        products[v][o] = sum_all(sums[v][o]);
                    }
                }
            }
            products
        }
    }
}

/// Sums each group of 4 lanes of four vectors, as (0 + 2) + (1 + 3); lane 4 * g + i is group g of vector i.
///
/// # Safety
/// The CPU must have AVX-512 F.
#[inline(always)]
unsafe fn sum_quarters([a, b, c, d]: [__m512; 4]) -> __m512 {
    // SAFETY: the caller guarantees the instructions.
    unsafe {
        let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
        let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
        let high = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
        _mm512_add_ps(low, high)
    }
}

/// [`sum_halves`] of four vectors, one after another.
///
/// # Safety
/// The CPU must have AVX-512 F.
#[inline(always)]
unsafe fn sum_halves_of_four([a, b, c, d]: [__m512; 4]) -> __m512 {
    // SAFETY: the caller guarantees the instructions.
    unsafe {
        const LOW: i32 = 0b01_00_01_00;
        const HIGH: i32 = 0b11_10_11_10;
        let ab = _mm512_add_ps(_mm512_shuffle_f32x4::<LOW>(a, b), _mm512_shuffle_f32x4::<HIGH>(a, b));
        let cd = _mm512_add_ps(_mm512_shuffle_f32x4::<LOW>(c, d), _mm512_shuffle_f32x4::<HIGH>(c, d));
        let even = _mm512_shuffle_f32x4::<0b10_00_10_00>(ab, cd);
        _mm512_add_ps(even, _mm512_shuffle_f32x4::<0b11_01_11_01>(ab, cd))
    }
}

/// The sum of all lanes, in the order of [`sum_quarters`] followed by [`sum_halves`].
///
/// # Safety
/// The CPU must have AVX-512 F and DQ.
#[inline(always)]
unsafe fn sum_all(x: __m512) -> f32 {
    // SAFETY: the caller guarantees the instructions.
    unsafe {
        let x = _mm512_add_ps(x, _mm512_permute_ps::<0b01_00_11_10>(x));
        let x = _mm512_add_ps(x, _mm512_permute_ps::<0b10_11_00_01>(x));
        _mm_cvtss_f32(sum_halves(x))
    }
}

/// The sum of the four 128-bit parts, lane by lane: upper half plus lower half, twice.
///
/// # Safety
/// The CPU must have AVX-512 F and DQ.
#[inline(always)]
unsafe fn sum_halves(x: __m512) -> __m128 {
    // SAFETY: the caller guarantees the instructions.
    unsafe {
        let x = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
        _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x))
    }
}
