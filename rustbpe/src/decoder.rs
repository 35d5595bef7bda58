//! The model's forward pass on a CPU: a step of decoding, or prompts.
//!
//! A step reads every weight once, and the memory sets its pace. It is a list of stages (a product with a matrix, the
//! attention of a layer, ...), each cut into chunks; a thread takes the next chunk of the stage, and goes on to the
//! next stage when all of them are done. Nobody waits for a thread that the machine has not let run yet.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::lanes::{Any, Fuses, LANES, Line, Machine, add_each, by_lanes, exp, fetch_start, lines, round};
#[cfg(target_arch = "x86_64")]
use crate::lanes::{Dots, Wide};
use crate::matmul::{Give, Kept, Matrix, Vectors};

const CHUNK: usize = 1 << 18; // weights of a matrix, at most
const THREAD: usize = 1 << 26; // multiplications that keep one busy for about a millisecond: fewer are not shared out
const SPAN: usize = 8; // tokens of a row that attend together
const BLOCK: usize = 32; // values that stay near the processor while a span attends to them
const SPINS: usize = 1 << 12; // looks at a stage before giving the core away

/// The matrices of a layer; queries, keys and values come from one.
pub struct Layer {
    pub qkv: Matrix,
    pub proj: Matrix,
    pub up: Matrix,
    pub down: Matrix,
}

impl Layer {
    fn weights(&self) -> usize {
        [self.qkv, self.proj, self.up, self.down].iter().map(|matrix| matrix.n_out * matrix.n_in).sum()
    }
}

/// A model's weights and shape.
pub struct Decoder {
    pub embedding: Matrix,
    pub layers: Vec<Layer>,
    pub head: Matrix,
    pub n_head: usize,
    pub n_kv_head: usize,
    pub head_dim: usize,
    pub eps: f32,
    pub softcap: f32,
}

// Nothing writes to the weights.
unsafe impl Send for Decoder {}
unsafe impl Sync for Decoder {}

/// Where keys and values lie, and as what.
#[derive(Clone, Copy)]
pub enum Place {
    F32(*mut f32),
    Bf16(*mut u16),
}

/// Keys and values (layers, 2, rows, n_kv_head, columns, head_dim) of the tokens so far.
#[derive(Clone, Copy)]
pub struct Cache {
    pub data: Place,
    pub rows: usize,
    pub columns: usize,
}

/// Cosines and sines (positions, head_dim / 2).
#[derive(Clone, Copy)]
pub struct Rotary {
    pub cos: *const f32,
    pub sin: *const f32,
}

/// A token of a row, and where in it.
#[derive(Clone, Copy)]
pub struct Token {
    pub id: usize,
    pub row: usize,
    pub position: usize,
}

#[derive(Clone, Copy)]
enum Then {
    Store,
    Add,
    SquaredRelu,
    /// softcap * tanh(value / softcap)
    Cap,
}

#[derive(Clone, Copy)]
enum Work {
    /// A token's embedding, normed.
    Embed,
    /// The vector of a token at `from`, which counts as normed or as it is, made ready for a product.
    Ready { matrix: Matrix, from: *const f32, normed: bool },
    /// Products of the vectors made ready.
    Project { matrix: Matrix, outputs: usize, from: *const f32, to: *mut f32, then: Then },
    /// A token's queries and keys rotated and normed; its keys and values go to the cache.
    Turn { layer: usize },
    /// What the heads that share keys and values attend to, of a span of tokens.
    Attend { layer: usize },
}

/// What a thread needs to attend.
#[derive(Default)]
struct Scratch {
    queries: Vec<Line>,
    rounded: Vec<Line>,
    scales: Vec<f32>,
    scores: Vec<f32>,
}

struct Stage {
    work: Work,
    chunks: usize,
    next: AtomicUsize,
    done: AtomicUsize,
}

struct Step {
    decoder: Arc<Decoder>,
    tokens: Vec<Token>,
    spans: Vec<Range<usize>>, // of tokens of one row
    cache: Cache,
    rotary: Rotary,
    stages: Vec<Stage>,
    // Activations, a line for each token.
    x: *mut f32,
    qkv: *mut f32,
    y: *mut f32,
    rounded: *mut u16, // of the vectors of the next product
    scales: *mut f32,  // what its results are multiplied by
}

// Chunks write to places of their own.
unsafe impl Send for Step {}
unsafe impl Sync for Step {}

/// Where products go, each vector's multiplied by its scale, and what is done with them on the way.
struct Outputs {
    to: *mut f32,
    width: usize,
    scales: *const f32,
    then: Then,
}

impl Give for Outputs {
    #[inline(always)]
    unsafe fn give<const V: usize, const O: usize>(&mut self, v: usize, o: usize, found: [[f32; O]; V]) {
        for (i, row) in found.iter().enumerate() {
            unsafe {
                let scale = *self.scales.add(v + i);
                let to = &mut *self.to.add((v + i) * self.width + o).cast::<[f32; O]>();
                match self.then {
                    Then::Store | Then::Cap => *to = row.map(|x| x * scale),
                    Then::Add => *to = std::array::from_fn(|j| to[j] + row[j] * scale),
                    Then::SquaredRelu => {
                        *to = row.map(|x| x * scale).map(|x| x.max(0.0) * x.max(0.0));
                    }
                }
            }
        }
    }
}

impl Decoder {
    /// Lets `tokens` join the cache, and writes the logits after each to `logits` (tokens, head.n_out), if it is given.
    /// Tokens of a row come in their order.
    ///
    /// # Safety
    /// The matrices, the cache with room for the tokens, the tables up to their positions and `logits` are there.
    pub unsafe fn forward(
        self: &Arc<Self>,
        tokens: Vec<Token>,
        cache: Cache,
        rotary: Rotary,
        logits: Option<*mut f32>,
        threads: usize,
    ) {
        let n = tokens.len();
        let weights: usize = self.layers.iter().map(Layer::weights).sum();
        let threads = if n * weights < THREAD { 1 } else { threads };
        let Layer { qkv, proj, up, .. } = &self.layers[0];
        let widths = [self.embedding.n_in, qkv.n_out, proj.n_in, up.n_out];
        let mut activations = widths.map(|width| lines(n * width));
        let [x, qkv, y, up] = activations.each_mut().map(|lines| lines.as_mut_ptr().cast::<f32>());
        let (mut rounded, mut scales) = (lines((n * widths.into_iter().fold(0, usize::max)).div_ceil(2)), lines(n));
        let (rounded, scales) = (rounded.as_mut_ptr().cast(), scales.as_mut_ptr().cast());
        let spans = spans(&tokens);
        let mut stages = Vec::new();
        let mut add = |(work, chunks)| {
            stages.push(Stage { work, chunks, next: AtomicUsize::new(0), done: AtomicUsize::new(0) });
        };
        let project = |matrix: Matrix, from: *const f32, normed, to, then| {
            let outputs = outputs_of_chunk(&matrix, threads);
            let ready = (Work::Ready { matrix, from, normed }, n);
            [ready, (Work::Project { matrix, outputs, from, to, then }, matrix.n_out.div_ceil(outputs))]
        };
        add((Work::Embed, n));
        for (layer, Layer { qkv: w_qkv, proj, up: w_up, down }) in self.layers.iter().enumerate() {
            project(*w_qkv, x, true, qkv, Then::Store).into_iter().for_each(&mut add);
            add((Work::Turn { layer }, n));
            if layer + 1 == self.layers.len() && logits.is_none() {
                break; // all keys and values are there
            }
            add((Work::Attend { layer }, spans.len() * self.n_kv_head));
            project(*proj, y, false, x, Then::Add).into_iter().for_each(&mut add);
            project(*w_up, x, true, up, Then::SquaredRelu).into_iter().for_each(&mut add);
            project(*down, up, false, x, Then::Add).into_iter().for_each(&mut add);
        }
        if let Some(logits) = logits {
            project(self.head, x, true, logits, Then::Cap).into_iter().for_each(&mut add);
        }
        let step =
            Arc::new(Step { decoder: self.clone(), tokens, spans, cache, rotary, stages, x, qkv, y, rounded, scales });
        for _ in 1..threads {
            // One that comes late finds nothing left, and touches nothing.
            let step = step.clone();
            rayon::spawn(move || unsafe { step.run() });
        }
        unsafe { step.run() };
    }
}

/// Neighbours of one row, SPAN at most.
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

/// How many outputs a chunk of a product has: so many that every thread gets as many chunks.
fn outputs_of_chunk(matrix: &Matrix, threads: usize) -> usize {
    let chunks = threads * (matrix.n_out * matrix.n_in).div_ceil(CHUNK * threads);
    matrix.n_out.div_ceil(chunks).next_multiple_of(LANES)
}

impl Step {
    /// Takes part until all stages are done.
    unsafe fn run(&self) {
        #[cfg(target_arch = "x86_64")]
        unsafe {
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
            unsafe fn avx512_bf16(step: &Step) {
                unsafe { step.run_as::<Dots>() }
            }
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            unsafe fn avx512(step: &Step) {
                unsafe { step.run_as::<Wide>() }
            }
            #[target_feature(enable = "avx2,fma")]
            unsafe fn avx2(step: &Step) {
                unsafe { step.run_as::<Fuses>() }
            }
            let wide = is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512dq");
            if wide && is_x86_feature_detected!("avx512bf16") {
                avx512_bf16(self)
            } else if wide {
                avx512(self)
            } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                avx2(self)
            } else {
                self.run_as::<Any>()
            }
        }
        #[cfg(target_arch = "aarch64")]
        unsafe {
            self.run_as::<Fuses>()
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        unsafe {
            self.run_as::<Any>()
        }
    }

    #[inline(always)]
    unsafe fn run_as<M: Machine>(&self) {
        let mut scratch = Scratch::default();
        for Stage { work, chunks, next, done } in &self.stages {
            loop {
                let chunk = next.fetch_add(1, Ordering::Relaxed);
                if chunk >= *chunks {
                    break;
                }
                unsafe {
                    match *work {
                        Work::Embed => self.embed(chunk),
                        Work::Ready { matrix, from, normed } => self.ready::<M>(&matrix, from, normed, chunk),
                        Work::Project { matrix, outputs, from, to, then } => {
                            let range = chunk * outputs..matrix.n_out.min((chunk + 1) * outputs);
                            self.project::<M>(&matrix, range, from, to, then);
                        }
                        Work::Turn { layer } => match self.cache.data {
                            Place::F32(data) => self.turn(data, layer, chunk),
                            Place::Bf16(data) => self.turn(data, layer, chunk),
                        },
                        Work::Attend { layer } => match self.cache.data {
                            Place::F32(data) => self.attend::<M, _>(data, layer, chunk, &mut scratch),
                            Place::Bf16(data) => self.attend::<M, _>(data, layer, chunk, &mut scratch),
                        },
                    }
                }
                done.fetch_add(1, Ordering::Release);
            }
            let mut spins = 0;
            while done.load(Ordering::Acquire) < *chunks {
                spins += 1;
                if spins < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
            }
        }
    }

    #[inline(always)]
    unsafe fn embed(&self, n: usize) {
        let (table, width) = (&self.decoder.embedding, self.decoder.embedding.n_in);
        unsafe {
            let x = self.x.add(n * width);
            table.row(self.tokens[n].id, x);
            self.norm(std::slice::from_raw_parts_mut(x, width));
        }
    }

    #[inline(always)]
    unsafe fn ready<M: Machine>(&self, matrix: &Matrix, from: *const f32, normed: bool, n: usize) {
        let width = matrix.n_in;
        unsafe {
            let x = from.add(n * width);
            // A normed vector's products are its own, by as much less.
            let scale = if normed { self.inverse_rms(std::slice::from_raw_parts(x, width)) } else { 1.0 };
            *self.scales.add(n) = scale;
            if matrix.rounds::<M>() {
                round(x, width, self.rounded.add(n * width));
            }
        }
    }

    #[inline(always)]
    unsafe fn project<M: Machine>(
        &self,
        matrix: &Matrix,
        range: Range<usize>,
        from: *const f32,
        to: *mut f32,
        then: Then,
    ) {
        let (n, x) = (self.tokens.len(), Vectors { plain: from, rounded: self.rounded });
        unsafe {
            matrix.times::<M>(x, n, range.clone(), &mut Outputs { to, width: matrix.n_out, scales: self.scales, then });
            if let Then::Cap = then {
                let cap = self.decoder.softcap;
                for i in 0..n {
                    let to = to.add(i * matrix.n_out);
                    for value in std::slice::from_raw_parts_mut(to.add(range.start), range.len()) {
                        *value = cap - 2.0 * cap / (exp::<M>(*value * (2.0 / cap)) + 1.0);
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn turn<K: Kept>(&self, cache: *mut K, layer: usize, n: usize) {
        let Decoder { n_head, n_kv_head, head_dim: d, .. } = *self.decoder;
        let Token { row, position, .. } = self.tokens[n];
        unsafe {
            let cos = std::slice::from_raw_parts(self.rotary.cos.add(position * d / 2), d / 2);
            let sin = std::slice::from_raw_parts(self.rotary.sin.add(position * d / 2), d / 2);
            let qkv = self.qkv.add(n * (n_head + 2 * n_kv_head) * d);
            for h in 0..n_head + n_kv_head {
                let head = std::slice::from_raw_parts_mut(qkv.add(h * d), d);
                let (first, second) = head.split_at_mut(d / 2);
                for i in 0..d / 2 {
                    let (a, b) = (first[i], second[i]);
                    first[i] = a * cos[i] + b * sin[i];
                    second[i] = b * cos[i] - a * sin[i];
                }
                self.norm(head);
            }
            for h in 0..n_kv_head {
                for (which, at) in [(0, n_head + h), (1, n_head + n_kv_head + h)] {
                    let to = cache.add(self.first(layer, which, row, h) + position * d);
                    for i in 0..d {
                        *to.add(i) = K::of(*qkv.add(at * d + i));
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn attend<M: Machine, K: Kept>(&self, cache: *const K, layer: usize, chunk: usize, scratch: &mut Scratch) {
        let Decoder { n_head, n_kv_head, head_dim: d, .. } = *self.decoder;
        let (span, kv, group) = (self.spans[chunk / n_kv_head].clone(), chunk % n_kv_head, n_head / n_kv_head);
        let columns_of = |n: usize| self.tokens[n].position + 1;
        let (n, columns) = (span.len() * group, columns_of(span.end - 1));
        let Scratch { queries, rounded, scales, scores } = scratch;
        for lines in [&mut *queries, &mut *rounded] {
            lines.resize((n * d).div_ceil(LANES), Line::default());
        }
        scales.resize(n, 1.0 / (d as f32).sqrt());
        scores.resize(n * columns, 0.0);
        unsafe {
            let row = self.tokens[span.start].row;
            let [keys, values] = [0, 1].map(|which| cache.add(self.first(layer, which, row, kv)));
            fetch_start(values, columns * d * size_of::<K>());
            let keys = Matrix { weights: K::weights(keys), n_out: columns, n_in: d };
            let (queries, rounded) = (queries.as_mut_ptr().cast::<f32>(), rounded.as_mut_ptr().cast::<u16>());
            for (i, n) in span.clone().enumerate() {
                let (from, at) = (self.qkv.add((n * (n_head + 2 * n_kv_head) + kv * group) * d), i * group * d);
                if keys.rounds::<M>() {
                    round(from, group * d, rounded.add(at));
                } else {
                    from.copy_to_nonoverlapping(queries.add(at), group * d);
                }
            }
            let mut to =
                Outputs { to: scores.as_mut_ptr(), width: columns, scales: scales.as_ptr(), then: Then::Store };
            keys.times::<M>(Vectors { plain: queries, rounded }, n, 0..columns, &mut to);

            let y = |i: usize| {
                let at = (span.start + i / group) * n_head + kv * group + i % group;
                std::slice::from_raw_parts_mut(self.y.add(at * d), d)
            };
            for (i, scores) in scores.chunks_exact_mut(columns).enumerate() {
                let scores = &mut scores[..columns_of(span.start + i / group)];
                let most =
                    by_lanes(scores, f32::MIN, |a, b| if b > a { b } else { a }).into_iter().fold(f32::MIN, f32::max);
                for score in scores.iter_mut() {
                    *score = exp::<M>(*score - most);
                }
                let sum: f32 = by_lanes(scores, 0.0, |a, b| a + b).iter().sum();
                scores.iter_mut().for_each(|score| *score /= sum);
                y(i).fill(0.0);
            }
            let values = std::slice::from_raw_parts(values, columns * d);
            for (block, values) in values.chunks(BLOCK * d).enumerate() {
                for (i, scores) in scores.chunks_exact(columns).enumerate() {
                    let end = columns_of(span.start + i / group).min((block + 1) * BLOCK);
                    if let Some(scores) = scores.get(block * BLOCK..end) {
                        add_each::<M, K>(y(i), values, scores);
                    }
                }
            }
        }
    }

    /// Where in the cache the keys (0) or values (1) of a row's head begin.
    #[inline(always)]
    fn first(&self, layer: usize, which: usize, row: usize, head: usize) -> usize {
        let Decoder { n_kv_head, head_dim, .. } = *self.decoder;
        let at = ((layer * 2 + which) * self.cache.rows + row) * n_kv_head + head;
        at * self.cache.columns * head_dim
    }

    #[inline(always)]
    fn inverse_rms(&self, x: &[f32]) -> f32 {
        let lanes = by_lanes(x, 0.0, |sum, x| sum + x * x);
        1.0 / (lanes.iter().sum::<f32>() / x.len() as f32 + self.decoder.eps).sqrt()
    }

    #[inline(always)]
    fn norm(&self, x: &mut [f32]) {
        let scale = self.inverse_rms(x);
        x.iter_mut().for_each(|x| *x *= scale);
    }
}
