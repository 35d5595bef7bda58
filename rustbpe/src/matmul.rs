//! Products of float32 vectors with a large matrix: of a few at the speed with which the memory gives the matrix away.
//!
//! The sums of a product are kept in the same order however many vectors there are: on a given machine, a vector's
//! result does not depend on its company.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::marker::PhantomData;
use std::ops::Range;

pub const LANES: usize = 16;
const LINE: usize = 64; // bytes that are fetched together
const AHEAD: usize = 4096; // bytes, at least
const TOGETHER: usize = 18; // vectors that stay near the processor while the rows go by

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

impl Weight for i8 {
    #[inline(always)]
    fn value(self) -> f32 {
        f32::from(self)
    }
}

/// The nearest bfloat16, of two the even one.
#[inline(always)]
fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

#[inline(always)]
fn fused<M: Machine>(a: f32, b: f32, sum: f32) -> f32 {
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

/// Adds as many of `vectors` as there are factors, each times its own, `N` at a time; they are added in their order.
#[inline(always)]
pub fn add_each<M: Machine, W: Weight, const N: usize>(to: &mut [f32], vectors: &[W], factors: &[f32]) {
    let (width, whole) = (to.len(), factors.len() - factors.len() % N);
    for n in (0..whole).step_by(N) {
        add_scaled::<M, W, N>(to, &vectors[n * width..], &factors[n..]);
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

#[inline(always)]
unsafe fn lanes<W: Weight>(p: *const W) -> [f32; LANES] {
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
                if V >= 4 {
                    let four = by_halves_of_four([parts[0], parts[1], parts[2], parts[3]]);
                    _mm512_storeu_ps(found.as_mut_ptr().cast(), four);
                    for v in 4..V {
                        _mm_storeu_ps(found[v].as_mut_ptr(), by_halves(parts[v]));
                    }
                } else {
                    for v in 0..V {
                        _mm_storeu_ps(found[v].as_mut_ptr(), by_halves(parts[v]));
                    }
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
    let together = if n_in > 1536 { 6 } else { TOGETHER };
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

/// Writes the nearest bfloat16 of the `n` values at `x` to `to`.
#[inline(always)]
pub unsafe fn round(x: *const f32, n: usize, to: *mut u16) {
    for i in 0..n {
        unsafe { *to.add(i) = to_bf16(*x.add(i)) };
    }
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
