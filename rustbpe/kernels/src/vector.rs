//! 16 float32 in registers, for the accumulators of products.
//!
//! x86-64 has explicit vectors. Left to the vectoriser, LLVM may transpose the inner loop of a product for the sake of
//! the sums at its end, which takes twice as long (rustc 1.95, AVX2 and AVX-512).

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use crate::element::Element;
use crate::simd::{LANES, sum_lanes};

/// LANES float32.
pub(crate) trait Vector: Copy {
    /// All zeros.
    ///
    /// # Safety
    /// The CPU must have the vector's instructions.
    unsafe fn zero() -> Self;

    /// LANES elements from `p` on, which need not be aligned.
    ///
    /// # Safety
    /// `p` must be valid for reads of LANES elements, and the CPU must have the vector's instructions.
    unsafe fn load<E: Element>(p: *const E) -> Self;

    /// `self + a * b`.
    ///
    /// # Safety
    /// The CPU must have the vector's instructions.
    unsafe fn add_product(self, a: Self, b: Self) -> Self;

    /// The sum of the lanes, in the order of [`sum_lanes`].
    ///
    /// # Safety
    /// The CPU must have the vector's instructions.
    unsafe fn sum(self) -> f32;
}

/// An array that the compiler vectorises; `FMA` fuses multiply and add. Needs no instructions beyond the target's.
#[derive(Clone, Copy)]
pub(crate) struct Array<const FMA: bool>([f32; LANES]);

impl<const FMA: bool> Vector for Array<FMA> {
    #[inline(always)]
    unsafe fn zero() -> Self {
        Self([0.0; LANES])
    }

    #[inline(always)]
    unsafe fn load<E: Element>(p: *const E) -> Self {
        // SAFETY: as the caller guarantees.
        Self(unsafe { crate::simd::load(p) })
    }

    #[inline(always)]
    unsafe fn add_product(mut self, a: Self, b: Self) -> Self {
        for lane in 0..LANES {
            let (a, b, sum) = (a.0[lane], b.0[lane], self.0[lane]);
            self.0[lane] = if FMA { a.mul_add(b, sum) } else { a * b + sum };
        }
        self
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        sum_lanes(std::hint::black_box(self.0)) // ends the vectorisation here, see above
    }
}

/// Two AVX2 registers.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx2([__m256; 2]);

#[cfg(target_arch = "x86_64")]
impl Vector for Avx2 {
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller guarantees AVX2.
        unsafe { Self([_mm256_setzero_ps(); 2]) }
    }

    #[inline(always)]
    unsafe fn load<E: Element>(p: *const E) -> Self {
        // SAFETY: as the caller guarantees.
        unsafe { Self([E::load_avx2(p), E::load_avx2(p.add(8))]) }
    }

    #[inline(always)]
    unsafe fn add_product(self, a: Self, b: Self) -> Self {
        // SAFETY: the caller guarantees FMA.
        unsafe { Self([_mm256_fmadd_ps(a.0[0], b.0[0], self.0[0]), _mm256_fmadd_ps(a.0[1], b.0[1], self.0[1])]) }
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: the caller guarantees AVX2.
        unsafe { sum_of_eight(_mm256_add_ps(self.0[0], self.0[1])) }
    }
}

/// The sum of the lanes: upper half plus lower half, until one is left.
///
/// # Safety
/// The CPU must have AVX.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn sum_of_eight(x: __m256) -> f32 {
    // SAFETY: the caller guarantees AVX.
    unsafe {
        let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
        _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
    }
}

/// One AVX-512 register.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx512Vector(__m512);

#[cfg(target_arch = "x86_64")]
impl Vector for Avx512Vector {
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller guarantees AVX-512 F.
        unsafe { Self(_mm512_setzero_ps()) }
    }

    #[inline(always)]
    unsafe fn load<E: Element>(p: *const E) -> Self {
        // SAFETY: as the caller guarantees.
        unsafe { Self(E::load_avx512(p)) }
    }

    #[inline(always)]
    unsafe fn add_product(self, a: Self, b: Self) -> Self {
        // SAFETY: the caller guarantees AVX-512 F.
        unsafe { Self(_mm512_fmadd_ps(a.0, b.0, self.0)) }
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: the caller guarantees AVX-512 F and DQ.
        unsafe { sum_of_eight(_mm256_add_ps(_mm512_castps512_ps256(self.0), _mm512_extractf32x8_ps::<1>(self.0))) }
    }
}
