//! Products of float32 vectors with a large matrix: of a few at the speed with which the memory gives the matrix away.
//!
//! The sums of a product are kept in the same order however many vectors there are: on a given machine, a vector's
//! result does not depend on its company.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::marker::PhantomData;
use std::ops::Range;

use crate::lanes::{AHEAD, LANES, LINE, Machine, Weight, fused, lanes, to_bf16, total};

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

/// What keys and values can be kept as.
pub trait Kept: Weight {
    fn of(x: f32) -> Self;
    fn weights(p: *const Self) -> Weights;
}

impl Kept for f32 {
    #[inline(always)]
    fn of(x: f32) -> Self {
        x
    }

    fn weights(p: *const Self) -> Weights {
        Weights::F32(p)
    }
}

impl Kept for u16 {
    #[inline(always)]
    fn of(x: f32) -> Self {
        to_bf16(x)
    }

    fn weights(p: *const Self) -> Weights {
        Weights::Bf16(p)
    }
}

/// Have the lines fetched that come after the `O` rows at `w`, when the product of these is `i` values on.
#[inline(always)]
fn fetch<W, const O: usize>(w: *const W, n_in: usize, i: usize, step: usize) {
    #[cfg(target_arch = "x86_64")]
    for part in 0..(O * step * size_of::<W>()).div_ceil(LINE) {
        // By itself the processor looks ahead to the end of a page only.
        let ahead = AHEAD.max(O * n_in * size_of::<W>()) + part * LINE;
        unsafe { _mm_prefetch(w.wrapping_add(O * i).cast::<i8>().wrapping_add(ahead), _MM_HINT_T0) };
    }
}

/// What becomes of products.
pub trait Give {
    /// `found[i][j]`: the product of vector `v + i` with row `o + j`.
    unsafe fn give<const V: usize, const O: usize>(&mut self, v: usize, o: usize, found: [[f32; O]; V]);
}

/// Gives products on, each multiplied by its row's scale.
struct Scaled<'a, G> {
    to: &'a mut G,
    scales: *const f32,
}

impl<G: Give> Give for Scaled<'_, G> {
    #[inline(always)]
    unsafe fn give<const V: usize, const O: usize>(&mut self, v: usize, o: usize, found: [[f32; O]; V]) {
        unsafe {
            let scales: [f32; O] = std::array::from_fn(|j| *self.scales.add(o + j));
            self.to.give::<V, O>(v, o, found.map(|row| std::array::from_fn(|j| row[j] * scales[j])));
        }
    }
}

/// How products are made. What the compiler makes of these is fragile (a closure around instructions of its own, kept
/// apart, made int8 five times as slow; a loop instead of one made float32 half as fast): after a change,
/// `python -m dev.bench.bench_engine`.
trait Way {
    type Weight;
    type Value;
    /// Whether a single vector takes the rows one by one: memory is read fastest as one stream.
    const ALONE: bool;
    /// Whether registers hold a block of 6 by 4 sums, else 2 by 2.
    const WIDE: bool;

    /// Products of `V` vectors with `O` rows.
    unsafe fn block<const V: usize, const O: usize>(
        w: *const Self::Weight,
        x: *const Self::Value,
        n_in: usize,
    ) -> [[f32; O]; V];
}

/// Any weights with float32, in multiples of LANES.
struct Sums<W, M>(PhantomData<(W, M)>);

impl<W: Weight, M: Machine> Way for Sums<W, M> {
    type Weight = W;
    type Value = f32;
    const ALONE: bool = false;
    const WIDE: bool = M::WIDE;

    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    unsafe fn block<const V: usize, const O: usize>(w: *const W, x: *const f32, n_in: usize) -> [[f32; O]; V] {
        let mut sums = [[[0.0; LANES]; O]; V];
        for i in (0..n_in).step_by(LANES) {
            fetch::<W, O>(w, n_in, i, LANES);
            let rows: [[f32; LANES]; O] = std::array::from_fn(|o| unsafe { lanes(w.add(o * n_in + i)) });
            for v in 0..V {
                let x = unsafe { lanes(x.add(v * n_in + i)) };
                for o in 0..O {
                    for lane in 0..LANES {
                        sums[v][o][lane] = fused::<M>(rows[o][lane], x[lane], sums[v][o][lane]);
                    }
                }
            }
        }
        sums.map(|rows| rows.map(total))
    }
}

/// Weights that are bfloat16, exactly.
#[cfg(target_arch = "x86_64")]
trait Pairs: Copy {
    unsafe fn pairs(p: *const Self) -> __m512bh;
}

#[cfg(target_arch = "x86_64")]
impl Pairs for u16 {
    #[inline(always)]
    unsafe fn pairs(p: *const Self) -> __m512bh {
        unsafe { std::mem::transmute(_mm512_loadu_si512(p.cast())) }
    }
}

#[cfg(target_arch = "x86_64")]
impl Pairs for i8 {
    #[inline(always)]
    unsafe fn pairs(p: *const Self) -> __m512bh {
        unsafe {
            let (first, second) = (_mm_loadu_si128(p.cast()), _mm_loadu_si128(p.cast::<__m128i>().add(1)));
            let first = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(first));
            let second = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(second));
            _mm512_cvtne2ps_pbh(second, first)
        }
    }
}

/// bfloat16 on both sides, in multiples of 2 * LANES.
#[cfg(target_arch = "x86_64")]
struct PairSums<W>(PhantomData<W>);

#[cfg(target_arch = "x86_64")]
impl<W: Pairs> Way for PairSums<W> {
    type Weight = W;
    type Value = u16;
    const ALONE: bool = true;
    const WIDE: bool = true;

    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    unsafe fn block<const V: usize, const O: usize>(w: *const W, x: *const u16, n_in: usize) -> [[f32; O]; V] {
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); O]; V];
            for i in (0..n_in).step_by(2 * LANES) {
                fetch::<W, O>(w, n_in, i, 2 * LANES);
                let mut rows = [std::mem::transmute::<__m512, __m512bh>(_mm512_setzero_ps()); O];
                for o in 0..O {
                    rows[o] = W::pairs(w.add(o * n_in + i));
                }
                for v in 0..V {
                    let x = u16::pairs(x.add(v * n_in + i));
                    for o in 0..O {
                        sums[v][o] = _mm512_dpbf16_ps(sums[v][o], rows[o], x);
                    }
                }
            }
            let mut found = [[0.0; O]; V];
            if O == 4 {
                let mut parts = [_mm512_setzero_ps(); V];
                for v in 0..V {
                    parts[v] = quarters([sums[v][0], sums[v][1], sums[v][2], sums[v][3]]);
                }
                let mut first = 0;
                if V >= 4 {
                    let four = by_halves_of_four([parts[0], parts[1], parts[2], parts[3]]);
                    _mm512_storeu_ps(found.as_mut_ptr().cast(), four);
                    first = 4;
                }
                for v in first..V {
                    _mm_storeu_ps(found[v].as_mut_ptr(), by_halves(parts[v]));
                }
            } else {
                for v in 0..V {
                    for o in 0..O {
                        found[v][o] = totals_of_one(sums[v][o]);
                    }
                }
            }
            found
        }
    }
}

/// Of each of four vectors the sums ((0 + 2) + (1 + 3)) of every four lanes, one vector's beside the next one's.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn quarters([a, b, c, d]: [__m512; 4]) -> __m512 {
    unsafe {
        let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
        let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
        let high = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
        _mm512_add_ps(low, high)
    }
}

/// by_halves() of four vectors, one after another.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn by_halves_of_four([a, b, c, d]: [__m512; 4]) -> __m512 {
    unsafe {
        const LOW: i32 = 0b01_00_01_00;
        const HIGH: i32 = 0b11_10_11_10;
        let ab = _mm512_add_ps(_mm512_shuffle_f32x4::<LOW>(a, b), _mm512_shuffle_f32x4::<HIGH>(a, b));
        let cd = _mm512_add_ps(_mm512_shuffle_f32x4::<LOW>(c, d), _mm512_shuffle_f32x4::<HIGH>(c, d));
        let even = _mm512_shuffle_f32x4::<0b10_00_10_00>(ab, cd);
        _mm512_add_ps(even, _mm512_shuffle_f32x4::<0b11_01_11_01>(ab, cd))
    }
}

/// The sum of the lanes of a vector, in the order of quarters() and by_halves().
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn totals_of_one(x: __m512) -> f32 {
    unsafe {
        let x = _mm512_add_ps(x, _mm512_permute_ps::<0b01_00_11_10>(x));
        let x = _mm512_add_ps(x, _mm512_permute_ps::<0b10_11_00_01>(x));
        _mm_cvtss_f32(by_halves(x))
    }
}

/// The sum of the four parts of a vector.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn by_halves(x: __m512) -> __m128 {
    unsafe {
        let x = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
        _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x))
    }
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

/// Gives `to` the products of `n` vectors and the rows in `range`, block by block.
#[inline(always)]
unsafe fn products<P: Way>(
    w: *const P::Weight,
    x: *const P::Value,
    n_in: usize,
    n: usize,
    range: Range<usize>,
    to: &mut impl Give,
) {
    macro_rules! rows {
        ($O:literal, $rows:expr, $first:expr, $end:expr) => {
            for o in $rows.step_by($O) {
                let mut v = $first;
                macro_rules! vectors {
                    ($V:literal) => {{
                        let found = unsafe { P::block::<$V, $O>(w.add(o * n_in), x.add(v * n_in), n_in) };
                        unsafe { to.give(v, o, found) };
                        v += $V;
                    }};
                }
                while v < $end {
                    match $end - v {
                        1 => vectors!(1),
                        _ if !P::WIDE => vectors!(2),
                        2 | 3 => vectors!(2),
                        4 | 5 | 8 => vectors!(4),
                        _ => vectors!(6),
                    }
                }
            }
        };
    }
    // Rows as short as keys lie within a page together.
    if n == 1 && P::ALONE && n_in >= 256 {
        rows!(1, range, 0, 1);
        return;
    }
    let whole = range.end - range.len() % if P::WIDE { 4 } else { 2 };
    // So many vectors stay near the processor while the rows go by.
    let together = if n_in > 1536 { 6 } else { 18 };
    for first in (0..n).step_by(together) {
        let end = n.min(first + together);
        if P::WIDE {
            rows!(4, range.start..whole, first, end);
        } else {
            rows!(2, range.start..whole, first, end);
        }
        rows!(1, whole..range.end, first, end);
    }
}

/// The same for any weights with float32, and rows of any length.
#[inline(always)]
unsafe fn sums<W: Weight, M: Machine>(
    w: *const W,
    x: *const f32,
    n_in: usize,
    n: usize,
    range: Range<usize>,
    to: &mut impl Give,
) {
    if n_in.is_multiple_of(LANES) {
        return unsafe { products::<Sums<W, M>>(w, x, n_in, n, range, to) };
    }
    for (v, o) in (0..n).flat_map(|v| range.clone().map(move |o| (v, o))) {
        unsafe { to.give(v, o, [[product(w.add(o * n_in), x.add(v * n_in), n_in)]]) };
    }
}

/// Vectors, one after another, and their nearest bfloat16 for a matrix that rounds().
#[derive(Clone, Copy)]
pub struct Vectors {
    pub plain: *const f32,
    pub rounded: *const u16,
}

impl Matrix {
    /// Whether an `M` multiplies vectors rounded to bfloat16 with this matrix.
    #[inline(always)]
    pub fn rounds<M: Machine>(&self) -> bool {
        M::DOTS && self.n_in.is_multiple_of(2 * LANES) && !matches!(self.weights, Weights::F32(_))
    }

    /// Gives `to` the products of the outputs in `range` and `n` vectors.
    ///
    /// # Safety
    /// The matrix and the vectors are there, and the processor is an `M`.
    #[inline(always)]
    pub unsafe fn times<M: Machine>(&self, x: Vectors, n: usize, range: Range<usize>, to: &mut impl Give) {
        let (n_in, Vectors { plain, rounded }) = (self.n_in, x);
        unsafe {
            #[cfg(target_arch = "x86_64")]
            if self.rounds::<M>() {
                return match self.weights {
                    Weights::Bf16(w) => products::<PairSums<_>>(w, rounded, n_in, n, range, to),
                    Weights::I8(w, scales) => {
                        products::<PairSums<_>>(w, rounded, n_in, n, range, &mut Scaled { to, scales });
                    }
                    Weights::F32(_) => unreachable!(),
                };
            }
            match self.weights {
                Weights::F32(w) => sums::<_, M>(w, plain, n_in, n, range, to),
                Weights::Bf16(w) => sums::<_, M>(w, plain, n_in, n, range, to),
                Weights::I8(w, scales) => sums::<_, M>(w, plain, n_in, n, range, &mut Scaled { to, scales }),
            }
        }
    }

    /// Writes row `i` to `to`.
    ///
    /// # Safety
    /// Both are there.
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
