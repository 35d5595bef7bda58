//! Arithmetic in lanes: plain loops over arrays that the compiler makes the processor's vectors of.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

pub const LANES: usize = 16;
pub const LINE: usize = 64; // bytes that are fetched together
pub const AHEAD: usize = 4096; // bytes, at least

/// What the processor can do.
pub trait Machine {
    /// Multiply and add in one.
    const FUSES: bool;
    /// Hold a block of 6 by 4 sums of LANES in its registers.
    const WIDE: bool;
    /// Multiply and add pairs of bfloat16: vectors are rounded to it where the weights are not float32.
    const DOTS: bool;
}

macro_rules! machine {
    ($name:ident, $fuses:literal, $wide:literal, $dots:literal) => {
        pub struct $name;
        impl Machine for $name {
            const FUSES: bool = $fuses;
            const WIDE: bool = $wide;
            const DOTS: bool = $dots;
        }
    };
}

machine!(Any, false, false, false);
machine!(Fuses, true, false, false);
#[cfg(target_arch = "x86_64")]
machine!(Wide, true, true, false);
#[cfg(target_arch = "x86_64")]
machine!(Dots, true, true, true);

/// What a processor reads at once, if it does not lie across two lines of its cache.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
pub struct Line(#[allow(dead_code)] [f32; LANES]); // read through pointers

/// Room for `n` values.
pub fn lines(n: usize) -> Vec<Line> {
    vec![Line::default(); n.div_ceil(LANES)]
}

pub trait Weight: Copy {
    fn value(self) -> f32;
}

impl Weight for f32 {
    #[inline(always)]
    fn value(self) -> f32 {
        self
    }
}

impl Weight for u16 {
    #[inline(always)]
    fn value(self) -> f32 {
        f32::from_bits(u32::from(self) << 16)
    }
}

impl Weight for i8 {
    #[inline(always)]
    fn value(self) -> f32 {
        f32::from(self)
    }
}

/// The nearest bfloat16, of two the even one.
#[inline(always)]
pub fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

#[inline(always)]
pub fn fused<M: Machine>(a: f32, b: f32, sum: f32) -> f32 {
    if M::FUSES { a.mul_add(b, sum) } else { a * b + sum }
}

/// e^x to 1e-7 of itself, in operations that a compiler makes vectors of: 2^n by its bits, the rest by a polynomial
/// (Cephes' expf); from -87 to 88, and beyond as at these ends.
#[inline(always)]
pub fn exp<M: Machine>(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to a whole number
    let x = x.clamp(-87.0, 88.0); // not max and min, which would hide a NaN
    let shifted = fused::<M>(x, std::f32::consts::LOG2_E, MAGIC);
    let n = shifted - MAGIC;
    let r = fused::<M>(n, -0.693_359_4, x);
    let r = fused::<M>(n, 2.121_944_4e-4, r);
    let coefficients = [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    let p = coefficients.iter().fold(1.987_569_1e-4, |p, &c| fused::<M>(p, r, c));
    let value = fused::<M>(p, r * r, r) + 1.0;
    value * f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23))
}

/// Adds the first `N` of `vectors`, which are as long as `to` and lie one after another, each times its factor.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
fn add_scaled<M: Machine, W: Weight, const N: usize>(to: &mut [f32], vectors: &[W], factors: &[f32]) {
    let width = to.len();
    let factors: [f32; N] = std::array::from_fn(|n| factors[n]);
    assert!(vectors.len() >= N * width);
    let (whole, rest) = to.as_chunks_mut::<LANES>();
    for (i, to) in whole.iter_mut().enumerate() {
        let mut sums = *to;
        for n in 0..N {
            let vector = unsafe { vectors.as_ptr().add(n * width + i * LANES) };
            prefetch(vector, AHEAD);
            let vector = unsafe { lanes(vector) };
            for lane in 0..LANES {
                sums[lane] = fused::<M>(factors[n], vector[lane], sums[lane]);
            }
        }
        *to = sums;
    }
    for (i, to) in (LANES * whole.len()..).zip(rest) {
        for n in 0..N {
            *to = fused::<M>(factors[n], vectors[n * width + i].value(), *to);
        }
    }
}

/// Adds as many of `vectors` as there are factors, each times its own, one after another.
#[inline(always)]
pub fn add_each<M: Machine, W: Weight>(to: &mut [f32], vectors: &[W], factors: &[f32]) {
    let (width, whole) = (to.len(), factors.len() - factors.len() % 4);
    for n in (0..whole).step_by(4) {
        add_scaled::<M, W, 4>(to, &vectors[n * width..], &factors[n..]);
    }
    for n in whole..factors.len() {
        add_scaled::<M, W, 1>(to, &vectors[n * width..], &factors[n..]);
    }
}

/// `values` taken together, those of each lane apart.
#[inline(always)]
pub fn by_lanes(values: &[f32], start: f32, take: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    let mut lanes = [start; LANES];
    let (whole, rest) = values.as_chunks::<LANES>();
    for part in whole {
        for lane in 0..LANES {
            lanes[lane] = take(lanes[lane], part[lane]);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(rest) {
        *lane = take(*lane, value);
    }
    lanes
}

/// The sum of the lanes, by halves.
#[inline(always)]
pub fn total(mut lanes: [f32; LANES]) -> f32 {
    let mut n = LANES;
    while n > 1 {
        n /= 2;
        for i in 0..n {
            lanes[i] += lanes[i + n];
        }
    }
    lanes[0]
}

#[inline(always)]
pub unsafe fn lanes<W: Weight>(p: *const W) -> [f32; LANES] {
    unsafe { p.cast::<[W; LANES]>().read_unaligned() }.map(W::value)
}

/// Have the line fetched that is `bytes` from `p`.
#[inline(always)]
fn prefetch<W>(p: *const W, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    unsafe {
        _mm_prefetch(p.cast::<i8>().wrapping_add(bytes), _MM_HINT_T0)
    };
}

/// Have the first lines fetched of what comes at `p`.
#[inline(always)]
pub fn fetch_start<W>(p: *const W, bytes: usize) {
    for byte in (0..bytes.min(AHEAD)).step_by(LINE) {
        prefetch(p, byte);
    }
}

/// Writes the nearest bfloat16 of the `n` values at `x` to `to`.
#[inline(always)]
pub unsafe fn round(x: *const f32, n: usize, to: *mut u16) {
    for i in 0..n {
        unsafe { *to.add(i) = to_bf16(*x.add(i)) };
    }
}
