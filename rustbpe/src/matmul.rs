//! Products of a few float32 vectors with a large matrix, at the speed with which the memory gives the matrix away.
//!
//! Sixteen sums are kept per product, in the same order however many vectors there are and on any machine that fuses
//! multiplying and adding: a vector's result does not depend on its company.

use std::ops::Range;

pub const LANES: usize = 16;
const LINE: usize = 64; // bytes that are fetched together
const AHEAD: usize = 4096; // bytes, at least

/// A matrix (n_out, n_in), row by row, in memory that outlives it.
#[derive(Clone, Copy)]
pub struct Matrix {
    pub weights: Weights,
    pub n_out: usize,
    pub n_in: usize,
}

/// Where the weights lie, and as what.
#[derive(Clone, Copy)]
pub enum Weights {
    F32(*const f32),
    /// The upper halves of float32.
    Bf16(*const u16),
    /// Whole numbers, and what each row of them is to be multiplied by.
    I8(*const i8, *const f32),
}

trait Weight: Copy {
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

#[inline(always)]
unsafe fn lanes<W: Weight>(p: *const W) -> [f32; LANES] {
    unsafe { p.cast::<[W; LANES]>().read_unaligned() }.map(W::value)
}

#[inline(always)]
fn fused<const FMA: bool>(a: f32, b: f32, sum: f32) -> f32 {
    if FMA { a.mul_add(b, sum) } else { a * b + sum }
}

/// e^x to 1e-7 of itself, in operations that a compiler makes vectors of: 2^n by its bits, the rest by a polynomial
/// (Cephes' expf); from -87 to 88, and beyond as at these ends.
#[inline(always)]
pub fn exp<const FMA: bool>(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to a whole number
    let x = x.clamp(-87.0, 88.0); // not max and min, which would hide a NaN
    let shifted = fused::<FMA>(x, std::f32::consts::LOG2_E, MAGIC);
    let n = shifted - MAGIC;
    let r = fused::<FMA>(n, -0.693_359_4, x);
    let r = fused::<FMA>(n, 2.121_944_4e-4, r);
    let coefficients = [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    let p = coefficients.iter().fold(1.987_569_1e-4, |p, &c| fused::<FMA>(p, r, c));
    let value = fused::<FMA>(p, r * r, r) + 1.0;
    value * f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23))
}

/// The sum of the lanes, by halves.
#[inline(always)]
fn total(mut lanes: [f32; LANES]) -> f32 {
    let mut n = LANES;
    while n > 1 {
        n /= 2;
        for i in 0..n {
            lanes[i] += lanes[i + n];
        }
    }
    lanes[0]
}

/// Products of `V` vectors with `O` rows, which are multiples of LANES long.
#[inline(always)]
unsafe fn block<W: Weight, const FMA: bool, const V: usize, const O: usize>(
    w: *const W,
    x: *const f32,
    n_in: usize,
) -> [[f32; O]; V] {
    let mut sums = [[[0.0; LANES]; O]; V];
    for i in (0..n_in).step_by(LANES) {
        unsafe {
            let rows: [[f32; LANES]; O] = std::array::from_fn(|o| lanes(w.add(o * n_in + i)));
            #[cfg(target_arch = "x86_64")]
            for part in 0..(O * LANES * size_of::<W>()).div_ceil(LINE) {
                // By itself the processor looks ahead to the end of a page only.
                use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
                let ahead = AHEAD.max(O * n_in * size_of::<W>()) + part * LINE;
                _mm_prefetch(w.wrapping_add(O * i).cast::<i8>().wrapping_add(ahead), _MM_HINT_T0);
            }
            for v in 0..V {
                let x = lanes(x.add(v * n_in + i));
                for o in 0..O {
                    for lane in 0..LANES {
                        sums[v][o][lane] = fused::<FMA>(rows[o][lane], x[lane], sums[v][o][lane]);
                    }
                }
            }
        }
    }
    sums.map(|rows| rows.map(total))
}

/// The product of two vectors of any length, value by value.
#[inline(never)]
unsafe fn product<W: Weight>(w: *const W, x: *const f32, n_in: usize) -> f32 {
    let mut sums = [0.0; LANES];
    for i in 0..n_in {
        sums[i % LANES] += unsafe { (*w.add(i)).value() * *x.add(i) };
    }
    total(sums)
}

/// Calls `give(vector, output, product)` for the rows in `range` of a matrix and the `n` vectors at `x`, one after
/// another.
///
/// # Safety
/// The matrix and the vectors are there, and the processor fuses multiplying and adding if `FMA`.
#[inline(always)]
unsafe fn products<W: Weight, const FMA: bool>(
    w: *const W,
    x: *const f32,
    n_in: usize,
    n: usize,
    range: Range<usize>,
    mut give: impl FnMut(usize, usize, f32),
) {
    if n_in % LANES != 0 {
        for (v, o) in (0..n).flat_map(|v| range.clone().map(move |o| (v, o))) {
            give(v, o, unsafe { product(w.add(o * n_in), x.add(v * n_in), n_in) });
        }
        return;
    }
    macro_rules! blocks {
        ($O:literal, $range:expr) => {
            for o in $range.step_by($O) {
                let mut v = 0;
                macro_rules! give {
                    ($V:literal) => {{
                        let found = unsafe { block::<W, FMA, $V, $O>(w.add(o * n_in), x.add(v * n_in), n_in) };
                        for (i, row) in found.iter().enumerate() {
                            for (j, &product) in row.iter().enumerate() {
                                give(v + i, o + j, product);
                            }
                        }
                        v += $V;
                    }};
                }
                while v < n {
                    match n - v {
                        1 => give!(1),
                        2 | 3 => give!(2),
                        _ => give!(4),
                    }
                }
            }
        };
    }
    let whole = range.end - range.len() % 4;
    blocks!(4, range.start..whole);
    blocks!(1, whole..range.end);
}

impl Matrix {
    /// Calls `give(vector, output, product)` for the outputs in `range` and the `n` vectors at `x`, see `products`.
    #[inline(always)]
    pub unsafe fn times<const FMA: bool>(
        &self,
        x: *const f32,
        n: usize,
        range: Range<usize>,
        mut give: impl FnMut(usize, usize, f32),
    ) {
        unsafe {
            match self.weights {
                Weights::F32(w) => products::<_, FMA>(w, x, self.n_in, n, range, give),
                Weights::Bf16(w) => products::<_, FMA>(w, x, self.n_in, n, range, give),
                Weights::I8(w, scales) => {
                    products::<_, FMA>(w, x, self.n_in, n, range, |v, o, product| give(v, o, product * *scales.add(o)));
                }
            }
        }
    }

    /// Writes row `i` to `to`.
    #[inline(always)]
    pub unsafe fn row(&self, i: usize, to: *mut f32) {
        let start = i * self.n_in;
        for j in 0..self.n_in {
            unsafe {
                *to.add(j) = match self.weights {
                    Weights::F32(w) => *w.add(start + j),
                    Weights::Bf16(w) => (*w.add(start + j)).value(),
                    Weights::I8(w, scales) => (*w.add(start + j)).value() * *scales.add(i),
                };
            }
        }
    }
}
