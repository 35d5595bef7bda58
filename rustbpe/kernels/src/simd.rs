//! Arithmetic on arrays of [`LANES`] values, in plain loops that the compiler vectorises.

#[cfg(all(target_arch = "x86_64", not(miri)))]
use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};

use crate::element::Element;
use crate::isa::Simd;

/// Values that are processed together: one AVX-512 register of float32.
pub(crate) const LANES: usize = 16;
/// Bytes of a cache line.
pub(crate) const CACHE_LINE: usize = 64;
/// Bytes between the data being read and the data being prefetched, at least.
pub(crate) const PREFETCH_BYTES: usize = 4096;

/// `a * b + c`, fused where the instruction set can.
#[inline(always)]
pub(crate) fn mul_add<S: Simd>(a: f32, b: f32, c: f32) -> f32 {
    if S::FMA { a.mul_add(b, c) } else { a * b + c }
}

/// e^x with a relative error of 1e-7, for x from -87 to 88; x outside is clamped.
///
/// Cephes' expf in operations that vectorise: the integer part of x / ln 2 goes into the exponent's bits, a polynomial
/// covers the rest.
#[inline(always)]
pub(crate) fn exp<S: Simd>(x: f32) -> f32 {
    const ROUND_TO_INTEGER: f32 = 12_582_912.0; // 1.5 * 2^23: adding it drops the fraction
    let x = x.clamp(-87.0, 88.0); // unlike max and min, clamp keeps a NaN
    let shifted = mul_add::<S>(x, std::f32::consts::LOG2_E, ROUND_TO_INTEGER);
    let n = shifted - ROUND_TO_INTEGER;
    let r = mul_add::<S>(n, -0.693_359_4, x);
    let r = mul_add::<S>(n, 2.121_944_4e-4, r);
    let coefficients = [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    let p = coefficients.iter().fold(1.987_569_1e-4, |p, &c| mul_add::<S>(p, r, c));
    let value = mul_add::<S>(p, r * r, r) + 1.0;
    value * f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23))
}

/// Adds `N` vectors to `to`, each times its factor. `vectors` holds them one after another, each as long as `to`.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
fn add_scaled<S: Simd, E: Element, const N: usize>(to: &mut [f32], vectors: &[E], factors: &[f32]) {
    let width = to.len();
    let factors: [f32; N] = std::array::from_fn(|n| factors[n]);
    assert!(vectors.len() >= N * width);
    let (chunks, rest) = to.as_chunks_mut::<LANES>();
    for (i, to) in chunks.iter_mut().enumerate() {
        let mut sums = *to;
        for n in 0..N {
            // SAFETY: n < N and (i + 1) * LANES <= width, so this vector's LANES values are within N * width.
            let vector = unsafe { vectors.as_ptr().add(n * width + i * LANES) };
            prefetch(vector, PREFETCH_BYTES);
            // SAFETY: as above.
            let vector = unsafe { load(vector) };
            for lane in 0..LANES {
                sums[lane] = mul_add::<S>(factors[n], vector[lane], sums[lane]);
            }
        }
        *to = sums;
    }
    for (i, to) in (LANES * chunks.len()..).zip(rest) {
        for n in 0..N {
            *to = mul_add::<S>(factors[n], vectors[n * width + i].to_f32(), *to);
        }
    }
}

/// Adds one vector per factor to `to`, each times its factor, in order.
#[inline(always)]
pub(crate) fn add_weighted<S: Simd, E: Element>(to: &mut [f32], vectors: &[E], factors: &[f32]) {
    let (width, in_fours) = (to.len(), factors.len() - factors.len() % 4);
    for n in (0..in_fours).step_by(4) {
        add_scaled::<S, E, 4>(to, &vectors[n * width..], &factors[n..]);
    }
    for n in in_fours..factors.len() {
        add_scaled::<S, E, 1>(to, &vectors[n * width..], &factors[n..]);
    }
}

/// Folds `values` with `f`, in LANES independent accumulators that begin at `start`: value i goes to lane i % LANES.
#[inline(always)]
pub(crate) fn fold_lanes(values: &[f32], start: f32, f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    let mut lanes = [start; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = f(lanes[lane], chunk[lane]);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(rest) {
        *lane = f(*lane, value);
    }
    lanes
}

/// The sum of the lanes, pairwise: upper half plus lower half, until one is left.
#[inline(always)]
pub(crate) fn sum_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut n = LANES;
    while n > 1 {
        n /= 2;
        for i in 0..n {
            lanes[i] += lanes[i + n];
        }
    }
    lanes[0]
}

/// LANES values from `p` on, as float32.
///
/// # Safety
/// `p` must be valid for reads of LANES values; it need not be aligned.
#[inline(always)]
pub(crate) unsafe fn load<E: Element>(p: *const E) -> [f32; LANES] {
    // SAFETY: the caller guarantees LANES readable values, and the read is unaligned.
    unsafe { p.cast::<[E; LANES]>().read_unaligned() }.map(E::to_f32)
}

/// Prefetches the cache line `bytes` past `p`. The address may be invalid.
#[inline(always)]
pub(crate) fn prefetch<T>(p: *const T, bytes: usize) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: a prefetch is a hint that never faults, and SSE is part of x86-64.
    unsafe {
        _mm_prefetch(p.cast::<i8>().wrapping_add(bytes), _MM_HINT_T0)
    };
    #[cfg(any(not(target_arch = "x86_64"), miri))]
    let _ = (p, bytes);
}

/// Prefetches the first cache lines of the `bytes` bytes at `p`.
#[inline(always)]
pub(crate) fn prefetch_start<T>(p: *const T, bytes: usize) {
    for byte in (0..bytes.min(PREFETCH_BYTES)).step_by(CACHE_LINE) {
        prefetch(p, byte);
    }
}
