//! Instruction sets: which ones the CPU has, and how a kernel is compiled for each.

use crate::vector::{Array, Vector};
#[cfg(target_arch = "x86_64")]
use crate::vector::{Avx2, Avx512Vector};

/// An instruction set that the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Isa {
    /// What the compilation target guarantees: SSE2 on x86-64, NEON on AArch64.
    Portable,
    /// Fused multiply-add: AVX2 and FMA on x86-64, NEON on AArch64.
    Fma,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// [`Avx512`](Self::Avx512) and dot products of bfloat16 pairs (AVX512-BF16).
    Avx512Bf16,
}

impl Isa {
    /// All instruction sets, the slowest first.
    const ALL: [Self; 4] = [Self::Portable, Self::Fma, Self::Avx512, Self::Avx512Bf16];

    /// The fastest instruction set of this CPU.
    pub fn detect() -> Self {
        Self::ALL.into_iter().rev().find(|isa| isa.is_available()).unwrap_or(Self::Portable)
    }

    /// The instruction sets of this CPU, the slowest first.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|isa| isa.is_available())
    }

    /// Whether this CPU has the instruction set.
    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            let fma = || is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = || {
                fma()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            };
            match self {
                Self::Portable => true,
                Self::Fma => fma(),
                Self::Avx512 => avx512(),
                Self::Avx512Bf16 => avx512() && is_x86_feature_detected!("avx512bf16"),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Self::Portable || self == Self::Fma && cfg!(target_arch = "aarch64")
        }
    }

    /// The result of `kernel`, compiled for this instruction set.
    ///
    /// # Panics
    /// If the CPU lacks the instruction set.
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        assert!(self.is_available(), "this CPU has no {self:?}");
        // SAFETY: the assertion checked that the CPU has the instruction set.
        unsafe {
            match self {
                Self::Portable => Portable::call(kernel),
                Self::Fma => Fma::call(kernel),
                #[cfg(target_arch = "x86_64")]
                Self::Avx512 => Avx512::call(kernel),
                #[cfg(target_arch = "x86_64")]
                Self::Avx512Bf16 => Avx512Bf16::call(kernel),
                #[cfg(not(target_arch = "x86_64"))]
                Self::Avx512 | Self::Avx512Bf16 => unreachable!("asserted above"),
            }
        }
    }
}

/// A computation that is compiled once per instruction set.
pub(crate) trait Kernel {
    /// What the computation returns.
    type Output;

    /// Runs the computation. Implementations are `#[inline(always)]`, so that they are compiled with the target features
    /// of the caller.
    ///
    /// # Safety
    /// The CPU must have the instructions of `S`.
    unsafe fn run<S: Simd>(self) -> Self::Output;
}

/// Compile-time description of an instruction set.
pub(crate) trait Simd {
    /// Has fused multiply-add.
    const FMA: bool;
    /// Has 32 registers of 16 floats, enough for a block of 6 x 4 accumulators.
    const WIDE: bool;
    /// Has dot products of bfloat16 pairs. Vectors are then rounded to bfloat16 unless the weights are float32.
    const BF16_DOT: bool;
    /// The accumulators of products.
    type Vector: Vector;

    /// The result of `kernel`, compiled for this instruction set as a function of its own. It is never inlined, so what
    /// the compiler makes of a hot loop does not depend on its caller.
    ///
    /// # Safety
    /// The CPU must have the instruction set.
    unsafe fn call<K: Kernel>(kernel: K) -> K::Output;
}

macro_rules! simd {
    ($name:ident, $vector:ty, $features:meta, fma: $fma:literal, wide: $wide:literal, bf16_dot: $bf16_dot:literal) => {
        /// See [`Isa`]'s variant of this name.
        pub(crate) struct $name;

        impl Simd for $name {
            const FMA: bool = $fma;
            const WIDE: bool = $wide;
            const BF16_DOT: bool = $bf16_dot;
            type Vector = $vector;

            #[inline(always)]
            unsafe fn call<K: Kernel>(kernel: K) -> K::Output {
                #[inline(never)]
                #[$features]
                fn compiled<K: Kernel>(kernel: K) -> K::Output {
                    // SAFETY: this function has the features of the instruction set.
                    unsafe { kernel.run::<$name>() }
                }
                #[allow(unused_unsafe)] // `Portable` has no features
                // SAFETY: the caller guarantees that the CPU has the instruction set.
                unsafe {
                    compiled(kernel)
                }
            }
        }
    };
}

simd!(Portable, Array<false>, cfg(true), fma: false, wide: false, bf16_dot: false);
#[cfg(target_arch = "x86_64")]
simd!(Fma, Avx2, target_feature(enable = "avx2,fma"), fma: true, wide: false, bf16_dot: false);
#[cfg(not(target_arch = "x86_64"))]
simd!(Fma, Array<true>, cfg(true), fma: true, wide: false, bf16_dot: false);
#[cfg(target_arch = "x86_64")]
simd!(
    Avx512,
    Avx512Vector,
    target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"),
    fma: true, wide: true, bf16_dot: false
);
#[cfg(target_arch = "x86_64")]
simd!(
    Avx512Bf16,
    Avx512Vector,
    target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"),
    fma: true, wide: true, bf16_dot: true
);
