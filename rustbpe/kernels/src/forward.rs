//! The forward pass: decoding one token of each row, or prefilling prompts.
//!
//! Decoding is memory-bandwidth-bound: each weight is read once per pass. The pass is a list of operations (a product,
//! the attention of a layer, ...), each cut into chunks that run in parallel; see `schedule`.

use std::ops::Range;

use crate::attention::{Attention, Scratch};
use crate::decoder::{Config, Decoder};
use crate::element::{Bf16, CacheElement};
use crate::isa::{Isa, Simd};
use crate::kv_cache::{CachePointer, Half, TypedCache};
use crate::matmul::{Epilogue, Matrix, Store, Vectors};
use crate::memory::{AlignedVec, SharedSlice};
use crate::ops::{inverse_rms, rms_norm, rotate, round_to_bf16, softcap_as};
use crate::schedule::{Work, run_stages};
use crate::simd::LANES;
use crate::{Error, Layer};

/// Weights of a product's chunk, at most.
const CHUNK_WEIGHTS: usize = 1 << 18;
/// A pass with fewer multiplications, about a millisecond's work, runs on one thread.
const MIN_PARALLEL_PRODUCTS: usize = 1 << 26;
/// Tokens of a row whose attention is one chunk.
const SPAN: usize = 8;

/// Cosines and sines of the rotary embedding, (positions, head_dim / 2) each.
#[derive(Debug, Clone, Copy)]
pub struct RotaryTables<'a> {
    /// Cosines.
    pub cos: &'a [f32],
    /// Sines.
    pub sin: &'a [f32],
}

impl RotaryTables<'_> {
    /// Checks that the tables have at least `positions` rows.
    pub(crate) fn check(&self, positions: usize, head_dim: usize) -> Result<(), Error> {
        let expected = positions.checked_mul(head_dim / 2);
        for (name, table) in [("cos", self.cos), ("sin", self.sin)] {
            if expected.is_none_or(|expected| table.len() < expected) {
                return Err(Error::Length { name, given: table.len(), expected });
            }
        }
        Ok(())
    }
}

/// A token, the row that it is appended to, and its position in it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Token {
    pub(crate) id: usize,
    pub(crate) row: usize,
    pub(crate) position: usize,
}

/// An operation; its chunks run in parallel.
#[derive(Clone, Copy)]
enum Op<'a> {
    /// The normed embedding of a token. One chunk per token.
    Embed,
    /// The scale of a product's input vector, and its bfloat16 if the product takes that. One chunk per token.
    PrepareInput(Product<'a>),
    /// The outputs of a product for all tokens. One chunk per `chunk_outputs` outputs.
    Project(Product<'a>),
    /// Rotates and normalises a token's queries and keys; stores its keys and values. One chunk per token.
    RotateAndCache { layer: usize },
    /// Attention of a span of tokens to one key and value head. One chunk per span and head.
    Attend { layer: usize },
}

/// A product of all tokens' vectors with matrices that share their input: their outputs lie side by side.
#[derive(Clone, Copy)]
struct Product<'a> {
    matrices: &'a [Matrix<'a>],
    n_in: usize,
    n_out: usize,
    chunk_outputs: usize,
    from: SharedSlice<f32>,
    /// Applies an RMS norm to the input.
    normalize: bool,
    to: SharedSlice<f32>,
    epilogue: Epilogue,
}

/// One forward pass, as its workers see it.
pub(crate) struct ForwardPass<'a> {
    decoder: &'a Decoder<'a>,
    tokens: &'a [Token],
    /// Ranges of up to SPAN consecutive tokens of one row.
    spans: Vec<Range<usize>>,
    cache: CachePointer,
    rotary: RotaryTables<'a>,
    ops: Vec<Op<'a>>,
    /// Residual stream (tokens, n_embd).
    x: SharedSlice<f32>,
    /// Queries, keys and values (tokens, (n_head + 2 * n_kv_head) * head_dim).
    qkv: SharedSlice<f32>,
    /// Results of the attention (tokens, n_head * head_dim).
    y: SharedSlice<f32>,
    /// Inputs of the next product in bfloat16 (tokens, n_in).
    rounded: SharedSlice<Bf16>,
    /// Scales of the next product's inputs (tokens).
    scales: SharedSlice<f32>,
}

impl<'a> ForwardPass<'a> {
    /// Runs the pass. The arguments are those of [`Decoder::forward`], which checks them.
    pub(crate) fn run(
        decoder: &'a Decoder<'a>,
        tokens: &'a [Token],
        cache: CachePointer,
        rotary: RotaryTables<'a>,
        logits: Option<&mut [f32]>,
        threads: usize,
        isa: Isa,
    ) {
        let (n, Config { n_head, n_kv_head, head_dim, .. }) = (tokens.len(), decoder.config);
        let threads = if n * decoder.n_weights < MIN_PARALLEL_PRODUCTS { 1 } else { threads.max(1) };
        let (n_embd, width, n_hidden) = (decoder.embedding.n_in(), n_head * head_dim, decoder.n_hidden);
        let qkv_width = width + 2 * n_kv_head * head_dim;
        let mut buffers = [n_embd, qkv_width, width, n_hidden].map(|width| AlignedVec::<f32>::zeros(n * width));
        let [x, qkv, y, hidden] = buffers.each_mut().map(|buffer| SharedSlice::new(buffer.as_mut_slice()));
        let mut rounded = AlignedVec::zeros(n * n_embd.max(width).max(n_hidden));
        let mut scales = AlignedVec::zeros(n);
        let mut pass = Self {
            decoder,
            tokens,
            spans: spans(tokens),
            cache,
            rotary,
            ops: Vec::with_capacity(2 + 10 * decoder.layers.len()),
            x,
            qkv,
            y,
            rounded: SharedSlice::new(rounded.as_mut_slice()),
            scales: SharedSlice::new(scales.as_mut_slice()),
        };
        pass.ops.push(Op::Embed);
        for (layer, Layer { qkv: w_qkv, attn_proj, fc, mlp_proj }) in decoder.layers.iter().enumerate() {
            pass.push_product(w_qkv, (x, true), (qkv, Epilogue::Assign), threads);
            pass.ops.push(Op::RotateAndCache { layer });
            if layer + 1 == decoder.layers.len() && logits.is_none() {
                break; // the cache is complete
            }
            pass.ops.push(Op::Attend { layer });
            pass.push_product(std::slice::from_ref(attn_proj), (y, false), (x, Epilogue::Add), threads);
            pass.push_product(std::slice::from_ref(fc), (x, true), (hidden, Epilogue::SquaredRelu), threads);
            pass.push_product(std::slice::from_ref(mlp_proj), (hidden, false), (x, Epilogue::Add), threads);
        }
        if let Some(logits) = logits {
            let to = (SharedSlice::new(logits), Epilogue::Softcap);
            pass.push_product(std::slice::from_ref(&decoder.head), (x, true), to, threads);
        }
        let chunks = pass.ops.iter().map(|op| pass.chunks(op));
        // SAFETY: chunks of one operation write disjoint elements and read none that another chunk of it writes: each
        // is of other tokens, outputs, or spans and heads. The buffers live until the end of this function.
        unsafe { run_stages(&pass, chunks, isa, threads) };
    }

    /// Adds a product from `(from, normalize)` to `(to, epilogue)`.
    fn push_product(
        &mut self,
        matrices: &'a [Matrix<'a>],
        (from, normalize): (SharedSlice<f32>, bool),
        (to, epilogue): (SharedSlice<f32>, Epilogue),
        threads: usize,
    ) {
        let (n_in, n_out) = (matrices[0].n_in(), matrices.iter().map(Matrix::n_out).sum::<usize>());
        // As many chunks for each thread, with whole cache lines of outputs.
        let chunks = threads * (n_out * n_in).div_ceil(CHUNK_WEIGHTS * threads);
        let chunk_outputs = n_out.div_ceil(chunks.max(1)).next_multiple_of(LANES);
        let product = Product { matrices, n_in, n_out, chunk_outputs, from, normalize, to, epilogue };
        self.ops.extend([Op::PrepareInput(product), Op::Project(product)]);
    }

    /// The number of chunks of an operation.
    fn chunks(&self, op: &Op<'_>) -> usize {
        match op {
            Op::Embed | Op::PrepareInput(_) | Op::RotateAndCache { .. } => self.tokens.len(),
            Op::Project(product) => product.n_out.div_ceil(product.chunk_outputs),
            Op::Attend { .. } => self.spans.len() * self.decoder.config.n_kv_head,
        }
    }

    #[inline(always)]
    fn qkv_width(&self) -> usize {
        let Config { n_head, n_kv_head, head_dim, .. } = self.decoder.config;
        (n_head + 2 * n_kv_head) * head_dim
    }

    /// # Safety
    /// As for [`Work::run_chunk`], with the chunk of a token.
    #[inline(always)]
    unsafe fn embed(&self, token: usize) {
        let n_embd = self.decoder.embedding.n_in();
        // SAFETY: each chunk writes its own token's row, and no other chunk of this operation accesses it.
        let x = unsafe { self.x.write(token * n_embd, n_embd) };
        self.decoder.embedding.copy_row(self.tokens[token].id, x);
        rms_norm(x, self.decoder.config.eps);
    }

    /// # Safety
    /// As for [`Work::run_chunk`], with the chunk of a token.
    #[inline(always)]
    unsafe fn prepare_input<S: Simd>(&self, product: &Product<'_>, token: usize) {
        let n_in = product.n_in;
        // SAFETY: this operation does not write `from`; each chunk writes the scale and the row of its own token.
        let (x, scale, rounded) = unsafe {
            let first = token * n_in;
            (product.from.read(first, n_in), self.scales.write(token, 1), self.rounded.write(first, n_in))
        };
        // The norm's factor is applied to the product, which is linear in its input.
        scale[0] = if product.normalize { inverse_rms(x, self.decoder.config.eps) } else { 1.0 };
        if product.matrices.iter().any(Matrix::rounds_inputs::<S>) {
            round_to_bf16(x, rounded);
        }
    }

    /// # Safety
    /// As for [`Work::run_chunk`], with a chunk of the product's outputs.
    #[inline(always)]
    unsafe fn project<S: Simd>(&self, product: &Product<'_>, chunk: usize) {
        let Product { matrices, n_in, n_out, chunk_outputs, from, to, epilogue, .. } = *product;
        let outputs = chunk * chunk_outputs..n_out.min((chunk + 1) * chunk_outputs);
        let n = self.tokens.len();
        // SAFETY: this operation writes neither of these.
        let (vectors, scales) = unsafe {
            let vectors = Vectors { plain: from.read(0, n * n_in), rounded: self.rounded.read(0, n * n_in) };
            (vectors, self.scales.read(0, n))
        };
        let mut first = 0; // output of the matrix
        for matrix in matrices {
            let end = first + matrix.n_out();
            let rows = outputs.start.clamp(first, end) - first..outputs.end.clamp(first, end) - first;
            if !rows.is_empty() {
                let mut out = Store { to: to.skip(first), stride: n_out, scales, epilogue };
                // SAFETY: each chunk writes its own outputs of all tokens, and `to` is not read by this operation. The
                // caller guarantees the instructions of S.
                unsafe { matrix.multiply_rows::<S>(vectors, n, rows, &mut out) };
            }
            first = end;
        }
        if epilogue == Epilogue::Softcap {
            for token in 0..n {
                // SAFETY: these are this chunk's outputs.
                let outputs = unsafe { to.write(token * n_out + outputs.start, outputs.len()) };
                softcap_as::<S>(outputs, self.decoder.config.softcap);
            }
        }
    }

    /// # Safety
    /// As for [`Work::run_chunk`], with the chunk of a token.
    #[inline(always)]
    unsafe fn rotate_and_cache<E: CacheElement>(&self, cache: TypedCache<E>, layer: usize, token: usize) {
        let Config { n_head, n_kv_head, head_dim, eps, .. } = self.decoder.config;
        let Token { row, position, .. } = self.tokens[token];
        let angles = position * head_dim / 2..(position + 1) * head_dim / 2;
        let (cos, sin) = (&self.rotary.cos[angles.clone()], &self.rotary.sin[angles]);
        // SAFETY: each chunk accesses its own token's row.
        let qkv = unsafe { self.qkv.write(token * self.qkv_width(), self.qkv_width()) };
        let (rotated, values) = qkv.split_at_mut((n_head + n_kv_head) * head_dim);
        for head in rotated.chunks_exact_mut(head_dim) {
            rotate(head, cos, sin);
            rms_norm(head, eps);
        }
        let keys = &rotated[n_head * head_dim..];
        for (half, vectors) in [(Half::Keys, keys), (Half::Values, &*values)] {
            for (head, vector) in vectors.chunks_exact(head_dim).enumerate() {
                // SAFETY: `Decoder::forward` checked row and position; tokens have distinct ones, and this operation
                // does not read the cache.
                unsafe { cache.store(layer, half, row, head, position, vector) };
            }
        }
    }

    /// # Safety
    /// As for [`Work::run_chunk`], with the chunk of a span and a head.
    #[inline(always)]
    unsafe fn attend<S: Simd, E: CacheElement>(
        &self,
        cache: TypedCache<E>,
        layer: usize,
        chunk: usize,
        scratch: &mut Scratch,
    ) {
        let Config { n_head, n_kv_head, head_dim, .. } = self.decoder.config;
        let (span, head, group) = (&self.spans[chunk / n_kv_head], chunk % n_kv_head, n_head / n_kv_head);
        let Token { row, position, .. } = self.tokens[span.start];
        let columns = position + span.len();
        // SAFETY: this operation writes neither queries nor cache; `Decoder::forward` checked row and positions.
        let (queries, keys, values) = unsafe {
            let first = span.start * self.qkv_width() + head * group * head_dim;
            let len = (span.len() - 1) * self.qkv_width() + group * head_dim;
            let [keys, values] = [Half::Keys, Half::Values].map(|half| cache.columns(layer, half, row, head, columns));
            (self.qkv.read(first, len), keys, values)
        };
        let attention = Attention {
            head_dim,
            group,
            n_tokens: span.len(),
            queries,
            query_stride: self.qkv_width(),
            keys,
            values,
            // Each chunk writes the results of its own tokens and heads.
            out: self.y.skip((span.start * n_head + head * group) * head_dim),
            out_stride: n_head * head_dim,
        };
        // SAFETY: the caller guarantees the instructions of S.
        unsafe { attention.run::<S>(scratch) }
    }
}

impl Work for ForwardPass<'_> {
    type Scratch = Scratch;

    #[inline(always)]
    unsafe fn run_chunk<S: Simd>(&self, stage: usize, chunk: usize, scratch: &mut Scratch) {
        // SAFETY: passed on as the caller guarantees it.
        unsafe {
            match self.ops[stage] {
                Op::Embed => self.embed(chunk),
                Op::PrepareInput(product) => self.prepare_input::<S>(&product, chunk),
                Op::Project(product) => self.project::<S>(&product, chunk),
                Op::RotateAndCache { layer } => match self.cache {
                    CachePointer::F32(cache) => self.rotate_and_cache(cache, layer, chunk),
                    CachePointer::Bf16(cache) => self.rotate_and_cache(cache, layer, chunk),
                },
                Op::Attend { layer } => match self.cache {
                    CachePointer::F32(cache) => self.attend::<S, _>(cache, layer, chunk, scratch),
                    CachePointer::Bf16(cache) => self.attend::<S, _>(cache, layer, chunk, scratch),
                },
            }
        }
    }
}

/// Cuts the tokens into ranges of consecutive tokens of one row, SPAN at most.
fn spans(tokens: &[Token]) -> Vec<Range<usize>> {
    let mut spans: Vec<Range<usize>> = Vec::new();
    for (n, token) in tokens.iter().enumerate() {
        match spans.last_mut() {
            Some(span) if tokens[span.start].row == token.row && span.len() < SPAN => span.end = n + 1,
            _ => spans.push(n..n + 1),
        }
    }
    spans
}
