//! Products of float32 vectors with a weight matrix in float32, bfloat16 or int8.
//!
//! The products of few vectors are memory-bandwidth-bound. Every product is summed in the same order, whatever the
//! number of vectors and rows: on one instruction set, a vector's results are independent of the batch it runs in.

use std::marker::PhantomData;
use std::ops::Range;

use crate::Error;
#[cfg(target_arch = "x86_64")]
use crate::avx512::Bf16Dot;
use crate::element::{Bf16, CacheElement, Element};
use crate::isa::{Isa, Kernel, Simd};
use crate::memory::{AlignedVec, SharedSlice};
use crate::simd::{CACHE_LINE, LANES, PREFETCH_BYTES, prefetch, sum_lanes};
use crate::vector::Vector;

/// The elements of a weight matrix, row by row.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Weights<'a> {
    /// float32.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [Bf16]),
    /// int8, and a float32 scale for each row.
    Int8(&'a [i8], &'a [f32]),
}

/// A weight matrix (n_out, n_in).
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    weights: Weights<'a>,
    n_out: usize,
    n_in: usize,
}

impl<'a> Matrix<'a> {
    /// A matrix of `n_out` rows of `n_in` weights.
    ///
    /// # Errors
    /// [`Error::Length`] if there are not `n_out * n_in` weights, or not `n_out` scales.
    pub fn new(weights: Weights<'a>, n_out: usize, n_in: usize) -> Result<Self, Error> {
        let (given, scales) = match weights {
            Weights::F32(w) => (w.len(), None),
            Weights::Bf16(w) => (w.len(), None),
            Weights::Int8(w, scales) => (w.len(), Some(scales.len())),
        };
        Error::check_length("weights", given, n_out.checked_mul(n_in))?;
        Error::check_length("scales", scales.unwrap_or(n_out), Some(n_out))?;
        Ok(Self { weights, n_out, n_in })
    }

    /// The matrix of all rows of `n_in` elements in `rows`.
    #[inline(always)]
    pub(crate) fn of_rows<E: CacheElement>(rows: &'a [E], n_in: usize) -> Self {
        Self { weights: E::weights(rows), n_out: rows.len() / n_in, n_in }
    }

    /// The number of rows.
    pub fn n_out(&self) -> usize {
        self.n_out
    }

    /// The length of a row.
    pub fn n_in(&self) -> usize {
        self.n_in
    }

    /// Writes the products of all `vectors` (n, n_in) with all rows to `out` (n, n_out), on one thread.
    ///
    /// # Errors
    /// [`Error::Length`] if `vectors` or `out` have another length, [`Error::Isa`] if the CPU has no `isa`.
    pub fn multiply(&self, isa: Isa, vectors: &[f32], out: &mut [f32]) -> Result<(), Error> {
        struct Multiply<'a>(Matrix<'a>, &'a [f32], usize, &'a mut [f32]);
        impl Kernel for Multiply<'_> {
            type Output = ();

            #[inline(always)]
            unsafe fn run<S: Simd>(self) {
                let Self(matrix, plain, n, out) = self;
                let mut rounded = AlignedVec::<Bf16>::zeros(plain.len());
                if matrix.rounds_inputs::<S>() {
                    crate::ops::round_to_bf16(plain, rounded.as_mut_slice());
                }
                let scales = vec![1.0; n];
                let mut out = Store {
                    to: SharedSlice::new(out),
                    stride: matrix.n_out,
                    scales: &scales,
                    epilogue: Epilogue::Assign,
                };
                let vectors = Vectors { plain, rounded: rounded.as_slice() };
                // SAFETY: the caller guarantees the instructions of S; `out` is exclusively ours and has n rows of n_out.
                unsafe { matrix.multiply_rows::<S>(vectors, n, 0..matrix.n_out, &mut out) };
            }
        }
        let n = vectors.len().checked_div(self.n_in).unwrap_or(0);
        Error::check_length("vectors", vectors.len(), Some(n * self.n_in))?;
        Error::check_length("out", out.len(), n.checked_mul(self.n_out))?;
        isa.check()?.run(Multiply(*self, vectors, n, out));
        Ok(())
    }

    /// Whether vectors are rounded to bfloat16 before the product with this matrix. Not for int8, whose conversion to
    /// bfloat16 takes longer than the product in float32.
    #[inline(always)]
    pub(crate) fn rounds_inputs<S: Simd>(&self) -> bool {
        S::BF16_DOT && self.n_in.is_multiple_of(2 * LANES) && matches!(self.weights, Weights::Bf16(_))
    }

    /// Passes the products of the first `n` vectors with the rows in `rows` to `out`.
    ///
    /// # Safety
    /// The CPU must have the instructions of `S`. `out` must accept products of vectors 0..n with `rows`.
    #[inline(always)]
    pub(crate) unsafe fn multiply_rows<S: Simd>(
        &self,
        vectors: Vectors<'_>,
        n: usize,
        rows: Range<usize>,
        out: &mut impl Output,
    ) {
        let n_in = self.n_in;
        assert!(rows.end <= self.n_out);
        #[cfg(target_arch = "x86_64")]
        if self.rounds_inputs::<S>()
            && let Weights::Bf16(w) = self.weights
        {
            assert!(vectors.rounded.len() >= n * n_in);
            let x = vectors.rounded.as_ptr();
            // SAFETY: `new` and the assertions checked the lengths of matrix and vectors; n_in is a multiple of
            // 2 * LANES; the caller guarantees AVX512-BF16, which `rounds_inputs` implies, and answers for `out`.
            return unsafe { S::call(Blocks::<Bf16Dot, _> { w: w.as_ptr(), x, n_in, n, rows, out }) };
        }
        assert!(vectors.plain.len() >= n * n_in);
        let x = vectors.plain.as_ptr();
        // SAFETY: `new` and the assertions checked the lengths of matrix and vectors; the caller answers for `out`.
        unsafe {
            match self.weights {
                Weights::F32(w) => multiply_any::<_, S>(w.as_ptr(), x, n_in, n, rows, out),
                Weights::Bf16(w) => multiply_any::<_, S>(w.as_ptr(), x, n_in, n, rows, out),
                Weights::Int8(w, scales) => {
                    multiply_any::<_, S>(w.as_ptr(), x, n_in, n, rows, &mut Rescale { out, scales });
                }
            }
        }
    }

    /// Writes row `i` to `to` (n_in) as float32.
    #[inline(always)]
    pub(crate) fn copy_row(&self, i: usize, to: &mut [f32]) {
        let row = i * self.n_in..(i + 1) * self.n_in;
        match self.weights {
            Weights::F32(w) => to.copy_from_slice(&w[row]),
            Weights::Bf16(w) => to.iter_mut().zip(&w[row]).for_each(|(to, w)| *to = w.to_f32()),
            Weights::Int8(w, scales) => {
                to.iter_mut().zip(&w[row]).for_each(|(to, w)| *to = w.to_f32() * scales[i]);
            }
        }
    }
}

/// Vectors (n, n_in), and the same in bfloat16, which only matrices with `rounds_inputs` read.
#[derive(Clone, Copy)]
pub(crate) struct Vectors<'a> {
    pub(crate) plain: &'a [f32],
    pub(crate) rounded: &'a [Bf16],
}

/// Receives products, a block at a time.
pub(crate) trait Output {
    /// Takes the products of vectors `v..v + V` with rows `o..o + O`: `products[i][j]` belongs to `v + i` and `o + j`.
    ///
    /// # Safety
    /// The vectors and rows must be among those that the output was made for.
    unsafe fn store<const V: usize, const O: usize>(&mut self, v: usize, o: usize, products: [[f32; O]; V]);
}

/// What happens to a product on its way to memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Epilogue {
    /// Overwrites the output.
    Assign,
    /// Adds to the output.
    Add,
    /// Overwrites the output with max(0, x)^2.
    SquaredRelu,
    /// Overwrites the output, to which the caller then applies [`softcap`](crate::ops::softcap).
    Softcap,
}

/// Writes products to `to` (n, stride), each times the scale of its vector.
///
/// Its maker guarantees that nobody else accesses the elements that belong to the rows of the product.
pub(crate) struct Store<'a> {
    pub(crate) to: SharedSlice<f32>,
    pub(crate) stride: usize,
    pub(crate) scales: &'a [f32],
    pub(crate) epilogue: Epilogue,
}

impl Output for Store<'_> {
    #[inline(always)]
    unsafe fn store<const V: usize, const O: usize>(&mut self, v: usize, o: usize, products: [[f32; O]; V]) {
        for (i, row) in products.iter().enumerate() {
            debug_assert!(v + i < self.scales.len());
            // SAFETY: the output was made for vector v + i, which has a scale, and for rows o..o + O, whose outputs are
            // exclusively ours. [f32; O] has the alignment of f32.
            let (scale, to) = unsafe {
                let to = self.to.write((v + i) * self.stride + o, O);
                (*self.scales.get_unchecked(v + i), &mut *to.as_mut_ptr().cast::<[f32; O]>())
            };
            match self.epilogue {
                Epilogue::Assign | Epilogue::Softcap => *to = row.map(|x| x * scale),
                Epilogue::Add => *to = std::array::from_fn(|j| to[j] + row[j] * scale),
                Epilogue::SquaredRelu => {
                    *to = row.map(|x| x * scale).map(|x| x.max(0.0) * x.max(0.0));
                }
            }
        }
    }
}

/// Multiplies each product by the scale of its row, for int8 weights.
struct Rescale<'a, T> {
    out: &'a mut T,
    scales: &'a [f32],
}

impl<T: Output> Output for Rescale<'_, T> {
    #[inline(always)]
    unsafe fn store<const V: usize, const O: usize>(&mut self, v: usize, o: usize, products: [[f32; O]; V]) {
        debug_assert!(o + O <= self.scales.len());
        // SAFETY: o..o + O are rows of the matrix, each of which has a scale; the caller answers for `out`.
        unsafe {
            let scales: [f32; O] = std::array::from_fn(|j| *self.scales.get_unchecked(o + j));
            self.out.store::<V, O>(v, o, products.map(|row| std::array::from_fn(|j| row[j] * scales[j])));
        }
    }
}

/// The innermost part of a product: a block of `V` vectors and `O` rows, with the sums in registers.
///
/// What the compiler makes of a block is fragile: a closure around intrinsics that was not inlined made int8 five times
/// as slow. After a change, run `cargo bench -p nanochat-kernels`.
pub(crate) trait MicroKernel {
    type Weight;
    type Value;
    /// Whether a single vector takes one row at a time: memory is read fastest as one stream.
    const ONE_ROW: bool;
    /// Whether the registers hold a block of 6 x 4 sums, instead of 2 x 2.
    const WIDE: bool;

    /// Dot products of the `V` vectors at `x` with the `O` rows at `w`, all of length `n_in`.
    ///
    /// # Safety
    /// `w` must be valid for reads of `O * n_in` weights, `x` for `V * n_in` values; `n_in` must be a multiple of the
    /// kernel's step, and the CPU must have the kernel's instructions.
    unsafe fn block<const V: usize, const O: usize>(
        w: *const Self::Weight,
        x: *const Self::Value,
        n_in: usize,
    ) -> [[f32; O]; V];
}

/// Any weights with float32 vectors, in steps of LANES.
struct F32Dot<E, S>(PhantomData<(E, S)>);

impl<E: Element, S: Simd> MicroKernel for F32Dot<E, S> {
    type Weight = E;
    type Value = f32;
    const ONE_ROW: bool = false;
    const WIDE: bool = S::WIDE;

    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    unsafe fn block<const V: usize, const O: usize>(w: *const E, x: *const f32, n_in: usize) -> [[f32; O]; V] {
        // SAFETY: n_in is a multiple of LANES, so i + LANES <= n_in; the caller guarantees O rows, V vectors and the
        // instructions of S.
        unsafe {
            let mut sums = [[S::Vector::zero(); O]; V];
            for i in (0..n_in).step_by(LANES) {
                prefetch_rows::<E, O>(w, n_in, i, LANES);
                let mut rows = [S::Vector::zero(); O];
                for o in 0..O {
                    rows[o] = S::Vector::load(w.add(o * n_in + i));
                }
                for v in 0..V {
                    let x = S::Vector::load(x.add(v * n_in + i));
                    for o in 0..O {
                        sums[v][o] = sums[v][o].add_product(rows[o], x);
                    }
                }
            }
            let mut products = [[0.0; O]; V];
            for v in 0..V {
                for o in 0..O {
                    products[v][o] = sums[v][o].sum();
                }
            }
            products
        }
    }
}

/// Prefetches what follows the `O` rows at `w`, `step` values of each row at a time; `i` is the position in the rows.
///
/// The hardware prefetcher stops at the end of a page.
#[inline(always)]
pub(crate) fn prefetch_rows<E, const O: usize>(w: *const E, n_in: usize, i: usize, step: usize) {
    for line in 0..(O * step * size_of::<E>()).div_ceil(CACHE_LINE) {
        let ahead = PREFETCH_BYTES.max(O * n_in * size_of::<E>()) + line * CACHE_LINE;
        prefetch(w.wrapping_add(O * i), ahead);
    }
}

/// Passes the products of `n` vectors with the rows in `rows` to `out`, block by block.
struct Blocks<'a, M: MicroKernel, T> {
    w: *const M::Weight,
    x: *const M::Value,
    n_in: usize,
    n: usize,
    rows: Range<usize>,
    out: &'a mut T,
}

impl<M: MicroKernel, T: Output> Kernel for Blocks<'_, M, T> {
    type Output = ();

    /// # Safety
    /// `w` must be valid for reads up to the end of `rows`, `x` for `n` vectors; `n_in` must be a multiple of the
    /// kernel's step, `out` must accept these products, and the CPU must have the instructions of `S` and `M`.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { w, x, n_in, n, rows, out } = self;
        // Macros and not closures, see MicroKernel.
        macro_rules! blocks {
            ($O:literal, $rows:expr, $first:expr, $end:expr) => {
                for o in $rows.step_by($O) {
                    let mut v = $first;
                    macro_rules! vectors {
                        ($V:literal) => {{
                            // SAFETY: rows o..o + $O are in `rows` and vectors v..v + $V below n; the rest is as the
                            // caller guarantees.
                            unsafe {
                                let products = M::block::<$V, $O>(w.add(o * n_in), x.add(v * n_in), n_in);
                                out.store(v, o, products);
                            }
                            v += $V;
                        }};
                    }
                    while v < $end {
                        match $end - v {
                            1 => vectors!(1),
                            _ if !M::WIDE => vectors!(2),
                            2 | 3 => vectors!(2),
                            4 | 5 | 8 => vectors!(4),
                            _ => vectors!(6),
                        }
                    }
                }
            };
        }
        // Short rows, such as keys, are read within a page anyway.
        if n == 1 && M::ONE_ROW && n_in >= 256 {
            blocks!(1, rows, 0, 1);
            return;
        }
        let in_blocks = rows.end - rows.len() % if M::WIDE { 4 } else { 2 };
        // As many vectors as stay in the cache while the rows pass.
        let cached = if n_in > 1536 { 6 } else { 18 };
        for first in (0..n).step_by(cached) {
            let end = n.min(first + cached);
            if M::WIDE {
                blocks!(4, rows.start..in_blocks, first, end);
            } else {
                blocks!(2, rows.start..in_blocks, first, end);
            }
            blocks!(1, in_blocks..rows.end, first, end);
        }
    }
}

/// The same for rows of any length, with float32 vectors.
///
/// # Safety
/// As for [`Blocks::run`], but `n_in` may be any number.
#[inline(always)]
unsafe fn multiply_any<E: Element, S: Simd>(
    w: *const E,
    x: *const f32,
    n_in: usize,
    n: usize,
    rows: Range<usize>,
    out: &mut impl Output,
) {
    if n_in.is_multiple_of(LANES) {
        // SAFETY: as the caller guarantees, and n_in is a multiple of the kernel's step.
        return unsafe { S::call(Blocks::<F32Dot<E, S>, _> { w, x, n_in, n, rows, out }) };
    }
    for (v, o) in (0..n).flat_map(|v| rows.clone().map(move |o| (v, o))) {
        // SAFETY: the caller guarantees that row o and vector v exist, and answers for `out`.
        unsafe { out.store(v, o, [[dot(w.add(o * n_in), x.add(v * n_in), n_in)]]) };
    }
}

/// The dot product of two vectors of any length, one value at a time.
///
/// # Safety
/// `w` and `x` must be valid for reads of `n_in` values.
#[inline(never)]
unsafe fn dot<E: Element>(w: *const E, x: *const f32, n_in: usize) -> f32 {
    let mut sums = [0.0; LANES];
    for i in 0..n_in {
        // SAFETY: i < n_in.
        sums[i % LANES] += unsafe { (*w.add(i)).to_f32() * *x.add(i) };
    }
    sum_lanes(sums)
}
