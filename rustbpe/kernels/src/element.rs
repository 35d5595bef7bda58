//! Element types of weights and of the KV cache.

use crate::matmul::Weights;

/// A bfloat16: the upper half of a float32.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Bf16(u16);

impl Bf16 {
    /// The nearest bfloat16; a tie goes to the even one. A NaN may become any value.
    #[inline(always)]
    pub fn from_f32(x: f32) -> Self {
        let bits = x.to_bits();
        Self((bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16)
    }

    /// The same value in float32.
    #[inline(always)]
    pub fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
}

/// An element of a weight matrix. Valid for any bits, and without padding.
pub trait Element: Copy + Default + Send + Sync + private::Sealed {
    /// The value in float32.
    fn to_f32(self) -> f32;
}

impl Element for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

impl Element for Bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        Bf16::to_f32(self)
    }
}

impl Element for i8 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from(self)
    }
}

/// An element of the KV cache.
pub trait CacheElement: Element {
    /// The nearest value of this type.
    fn from_f32(x: f32) -> Self;

    /// `values` as the weights of a matrix.
    fn weights(values: &[Self]) -> Weights<'_>;
}

impl CacheElement for f32 {
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }

    #[inline(always)]
    fn weights(values: &[Self]) -> Weights<'_> {
        Weights::F32(values)
    }
}

impl CacheElement for Bf16 {
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        Bf16::from_f32(x)
    }

    #[inline(always)]
    fn weights(values: &[Self]) -> Weights<'_> {
        Weights::Bf16(values)
    }
}

mod private {
    #[cfg(target_arch = "x86_64")]
    use std::arch::x86_64::*;

    use super::Bf16;

    /// Loads of elements as float32; the addresses need not be aligned.
    pub trait Sealed {
        /// 8 elements from `p` on.
        ///
        /// # Safety
        /// `p` must be valid for reads of 8 elements, and the CPU must have AVX2.
        #[cfg(target_arch = "x86_64")]
        unsafe fn load_avx2(p: *const Self) -> __m256;

        /// 16 elements from `p` on.
        ///
        /// # Safety
        /// `p` must be valid for reads of 16 elements, and the CPU must have AVX-512 F.
        #[cfg(target_arch = "x86_64")]
        unsafe fn load_avx512(p: *const Self) -> __m512;
    }

    macro_rules! impl_sealed {
        ($element:ty, |$p:ident| avx2: $avx2:expr, avx512: $avx512:expr) => {
            impl Sealed for $element {
                #[cfg(target_arch = "x86_64")]
                #[inline(always)]
                unsafe fn load_avx2($p: *const Self) -> __m256 {
                    // SAFETY: the caller guarantees the elements and the instructions.
                    unsafe { $avx2 }
                }

                #[cfg(target_arch = "x86_64")]
                #[inline(always)]
                unsafe fn load_avx512($p: *const Self) -> __m512 {
                    // SAFETY: the caller guarantees the elements and the instructions.
                    unsafe { $avx512 }
                }
            }
        };
    }

    impl_sealed!(f32, |p| avx2: _mm256_loadu_ps(p), avx512: _mm512_loadu_ps(p));
    impl_sealed!(
        Bf16,
        |p| avx2: _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())))),
        avx512: _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()))))
    );
    impl_sealed!(
        i8,
        |p| avx2: _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))),
        avx512: _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast())))
    );
}
