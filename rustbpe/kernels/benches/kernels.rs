//! Each kernel alone, and the whole forward pass: `cargo bench -p nanochat-kernels`.
//!
//! All on one thread but "forward", on random weights of a model of width 768. A name may be given as a filter.

#![allow(clippy::unwrap_used)] // a bench may panic

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use nanochat_kernels::{
    Bf16, CacheData, Config, Decoder, Isa, KvCache, Layer, Matrix, RotaryTables, Sampler, Weights, ops,
};

/// `n` values between -1 and 1, from a linear congruential generator.
fn random(n: usize) -> Vec<f32> {
    let mut state = 1_u64;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// The same weights in each type.
struct Typed {
    f32: Vec<f32>,
    bf16: Vec<Bf16>,
    int8: Vec<i8>,
    scales: Vec<f32>,
}

impl Typed {
    fn new(n_out: usize, n_in: usize) -> Self {
        let f32: Vec<f32> = random(n_out * n_in).iter().map(|x| x * 0.05).collect();
        let bf16 = f32.iter().map(|&x| Bf16::from_f32(x)).collect();
        let int8 = f32.iter().map(|x| (x * 2000.0) as i8).collect();
        Self { f32, bf16, int8, scales: vec![1.0 / 2000.0; n_out] }
    }

    fn weights(&self) -> [(&'static str, Weights<'_>); 3] {
        [
            ("f32", Weights::F32(&self.f32)),
            ("bf16", Weights::Bf16(&self.bf16)),
            ("int8", Weights::Int8(&self.int8, &self.scales)),
        ]
    }
}

fn product(c: &mut Criterion) {
    let (n_out, n_in) = (768, 768);
    let typed = Typed::new(n_out, n_in);
    let mut group = c.benchmark_group("product");
    for (name, weights) in typed.weights() {
        let matrix = Matrix::new(weights, n_out, n_in).unwrap();
        for n in [1, 8, 64] {
            let (vectors, mut out) = (random(n * n_in), vec![0.0; n * n_out]);
            group.throughput(Throughput::Elements((n * n_out * n_in) as u64));
            group.bench_function(BenchmarkId::new(name, n), |b| {
                b.iter(|| matrix.multiply(Isa::detect(), black_box(&vectors), &mut out));
            });
        }
    }
    group.finish();
}

fn small_ops(c: &mut Criterion) {
    let isa = Isa::detect();
    let mut group = c.benchmark_group("ops");
    let values = random(4096);
    group.throughput(Throughput::Elements(values.len() as u64));
    for (name, op) in [
        ("exp", ops::exp as fn(Isa, &mut [f32]) -> _),
        ("softmax", ops::softmax),
        ("softcap", |isa, x: &mut [f32]| ops::softcap(isa, x, 15.0)),
    ] {
        group.bench_function(name, |b| {
            b.iter_batched_ref(|| values.clone(), |x| op(isa, x), criterion::BatchSize::SmallInput)
        });
    }
    group.bench_function("rms_norm", |b| {
        b.iter_batched_ref(|| values.clone(), |x| ops::rms_norm(x, 1e-5), criterion::BatchSize::SmallInput);
    });
    group.finish();
}

fn attention(c: &mut Criterion) {
    let (d, columns, tokens) = (128, 1024, 8);
    let (queries, keys, values) = (random(tokens * d), random(columns * d), random(columns * d));
    let bf16 = |x: &[f32]| x.iter().map(|&x| Bf16::from_f32(x)).collect::<Vec<_>>();
    let (keys_bf16, values_bf16) = (bf16(&keys), bf16(&values));
    let mut group = c.benchmark_group("attention");
    for n in [1, tokens] {
        let (queries, mut out) = (&queries[..n * d], vec![0.0; n * d]);
        group.bench_function(BenchmarkId::new("f32", n), |b| {
            b.iter(|| ops::attention(Isa::detect(), queries, &keys, &values, d, 1, &mut out));
        });
        group.bench_function(BenchmarkId::new("bf16", n), |b| {
            b.iter(|| ops::attention(Isa::detect(), queries, &keys_bf16, &values_bf16, d, 1, &mut out));
        });
    }
    group.finish();
}

fn sampler(c: &mut Criterion) {
    let logits: Vec<f32> = random(65_536).iter().map(|x| x * 10.0).collect();
    let all = Sampler { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };
    let mut group = c.benchmark_group("sampler");
    for (name, sampler) in [
        ("greedy", Sampler { temperature: 0.0, ..all }),
        ("all", all),
        ("top_k", Sampler { top_k: 50, ..all }),
        ("top_p", Sampler { top_p: 0.9, ..all }),
    ] {
        group.bench_function(name, |b| b.iter(|| sampler.sample(black_box(&logits), 0.5)));
    }
    group.finish();
}

fn forward(c: &mut Criterion) {
    let (n_embd, vocab_size, n_layer, d, columns) = (768, 8192, 4, 128, 1024);
    let n_head = n_embd / d;
    // Square, up, down, and the head.
    let matrices = [(n_embd, n_embd), (4 * n_embd, n_embd), (n_embd, 4 * n_embd), (vocab_size, n_embd)]
        .map(|(n_out, n_in)| (Typed::new(n_out, n_in), n_out, n_in));
    let config = Config { n_head, n_kv_head: n_head, head_dim: d, eps: 1e-5, softcap: 15.0 };
    let (cos, sin) = (random(columns * d / 2), random(columns * d / 2));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut group = c.benchmark_group("forward");
    for i in 0..3 {
        let matrix = |of: usize| {
            let (typed, n_out, n_in) = &matrices[of];
            Matrix::new(typed.weights()[i].1, *n_out, *n_in).unwrap()
        };
        let layer = Layer { qkv: [matrix(0); 3], attn_proj: matrix(0), fc: matrix(1), mlp_proj: matrix(2) };
        let decoder = Decoder::new(matrix(3), vec![layer; n_layer], matrix(3), config).unwrap();
        let shape = [n_layer, 2, 8, n_head, columns, d];
        let mut data = vec![Bf16::default(); shape.iter().product()];
        for (name, rows, tokens) in [("decode 1 row", 1, 1), ("decode 8 rows", 8, 1), ("prefill 128", 1, 128)] {
            let (ids, mut logits) = (vec![vec![1; tokens]; rows], vec![0.0; rows * tokens * vocab_size]);
            let dtype = matrices[0].0.weights()[i].0;
            group.throughput(Throughput::Elements((rows * tokens) as u64));
            group.bench_function(BenchmarkId::new(dtype, name), |b| {
                b.iter(|| {
                    let mut cache = KvCache::new(CacheData::Bf16(&mut data), shape).unwrap();
                    let rotary = RotaryTables { cos: &cos, sin: &sin };
                    let logits = (tokens == 1).then_some(&mut logits[..]); // a prefill needs none
                    decoder.forward(&ids, &vec![64; rows], &mut cache, rotary, logits, threads)
                });
            });
        }
    }
    group.finish();
}

criterion_group!(all, product, small_ops, attention, sampler, forward);
criterion_main!(all);
