//! Attention of consecutive tokens of a row, for the query heads that share a key and value head.

use crate::element::{Bf16, CacheElement};
use crate::isa::{Kernel, Simd};
use crate::matmul::{Epilogue, Matrix, Store, Vectors};
use crate::memory::{AlignedVec, SharedSlice};
use crate::ops::{round_to_bf16, softmax_as};
use crate::simd::{add_weighted, prefetch_start};

/// Values that stay in the CPU's cache while all queries pass over them.
const VALUES_PER_BLOCK: usize = 32;

/// Inputs and output of one attention.
pub(crate) struct Attention<'a, E> {
    pub(crate) head_dim: usize,
    /// Query heads that share the key and value head.
    pub(crate) group: usize,
    pub(crate) n_tokens: usize,
    /// Queries: token `t` has `group * head_dim` values from `t * query_stride` on.
    pub(crate) queries: &'a [f32],
    pub(crate) query_stride: usize,
    /// Keys (columns, head_dim) up to the last token's own; each token attends to one column more than the one before.
    pub(crate) keys: &'a [E],
    /// Values, of the same shape.
    pub(crate) values: &'a [E],
    /// Results, laid out like the queries. Its maker guarantees that nobody else accesses their elements.
    pub(crate) out: SharedSlice<f32>,
    pub(crate) out_stride: usize,
}

/// A worker's buffers for [`Attention::run`].
#[derive(Default)]
pub(crate) struct Scratch {
    queries: AlignedVec<f32>,
    rounded: AlignedVec<Bf16>,
    scales: Vec<f32>,
    scores: Vec<f32>,
}

impl<E: CacheElement> Attention<'_, E> {
    /// Writes the results.
    ///
    /// # Safety
    /// The CPU must have the instructions of `S`.
    #[inline(always)]
    pub(crate) unsafe fn run<S: Simd>(&self, scratch: &mut Scratch) {
        let (d, group, n) = (self.head_dim, self.group, self.n_tokens * self.group);
        let columns = self.keys.len() / d;
        let Scratch { queries, rounded, scales, scores } = scratch;
        queries.resize(n * d);
        rounded.resize(n * d);
        scales.resize(n, 1.0 / (d as f32).sqrt());
        scores.resize(n * columns, 0.0);
        prefetch_start(self.values.as_ptr(), size_of_val(self.values));

        let keys = Matrix::of_rows(self.keys, d);
        for t in 0..self.n_tokens {
            let (from, to) = (&self.queries[t * self.query_stride..][..group * d], t * group * d..(t + 1) * group * d);
            if keys.rounds_inputs::<S>() {
                round_to_bf16(from, &mut rounded.as_mut_slice()[to]);
            } else {
                queries.as_mut_slice()[to].copy_from_slice(from);
            }
        }
        let to = SharedSlice::new(scores);
        let mut out = Store { to, stride: columns, scales, epilogue: Epilogue::Assign };
        let vectors = Vectors { plain: queries.as_slice(), rounded: rounded.as_slice() };
        // SAFETY: the caller guarantees the instructions of S; `scores` is exclusively ours and has n rows of `columns`.
        unsafe { keys.multiply_rows::<S>(vectors, n, 0..columns, &mut out) };

        for (i, scores) in scores.chunks_exact_mut(columns).enumerate() {
            softmax_as::<S>(&mut scores[..self.visible_columns(columns, i)]);
            self.out(i).fill(0.0);
        }
        for (block, values) in self.values.chunks(VALUES_PER_BLOCK * d).enumerate() {
            let first = block * VALUES_PER_BLOCK;
            for (i, scores) in scores.chunks_exact(columns).enumerate() {
                let end = self.visible_columns(columns, i).min(first + VALUES_PER_BLOCK);
                if let Some(weights) = scores.get(first..end) {
                    add_weighted::<S, E>(self.out(i), values, weights);
                }
            }
        }
    }

    /// The number of columns that query `i` attends to.
    #[inline(always)]
    fn visible_columns(&self, columns: usize, i: usize) -> usize {
        columns - self.n_tokens + 1 + i / self.group
    }

    /// The result of query `i`.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)] // `run` holds one at a time
    fn out(&self, i: usize) -> &mut [f32] {
        let first = i / self.group * self.out_stride + i % self.group * self.head_dim;
        // SAFETY: the maker of `self` guarantees that the results exist and are exclusively ours; `run` drops each
        // before it takes the next.
        unsafe { self.out.write(first, self.head_dim) }
    }
}

impl<E: CacheElement> Kernel for Attention<'_, E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the caller guarantees the instructions of S.
        unsafe { Attention::run::<S>(&self, &mut Scratch::default()) }
    }
}
