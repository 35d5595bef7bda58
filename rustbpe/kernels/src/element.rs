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
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for super::Bf16 {}
    impl Sealed for i8 {}
}
