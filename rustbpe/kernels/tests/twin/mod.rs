//! Scalar twins of the kernels in float64, and the random inputs of the tests.

#![allow(dead_code)] // each test uses a part
#![allow(clippy::unwrap_used)] // a test may panic

use nanochat_kernels::{Bf16, Config, Layer, Matrix, Sampler, Weights};

/// A generator of uniform numbers: xorshift64*.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// Uniform from -1 to 1.
    pub fn value(&mut self) -> f32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.value()).collect()
    }

    /// Uniform from 0 to n - 1.
    pub fn below(&mut self, n: usize) -> usize {
        ((self.value() + 1.0) / 2.0 * n as f32) as usize % n
    }
}

/// The element type of a matrix.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Dtype {
    F32,
    Bf16,
    Int8,
}

pub const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::Bf16, Dtype::Int8];

/// A matrix that owns its weights, and their values in float64.
pub struct OwnedMatrix {
    pub n_out: usize,
    pub n_in: usize,
    pub values: Vec<f64>,
    dtype: Dtype,
    f32: Vec<f32>,
    bf16: Vec<Bf16>,
    int8: Vec<i8>,
    scales: Vec<f32>,
}

impl OwnedMatrix {
    pub fn random(dtype: Dtype, n_out: usize, n_in: usize, std: f32, random: &mut Random) -> Self {
        let f32: Vec<f32> = random.values(n_out * n_in).iter().map(|x| x * std).collect();
        let bf16: Vec<Bf16> = f32.iter().map(|&x| Bf16::from_f32(x)).collect();
        let scales: Vec<f32> = (0..n_out).map(|i| std * (1.0 + i as f32 / n_out as f32) / 127.0).collect();
        let int8: Vec<i8> = f32.iter().enumerate().map(|(i, x)| (x / scales[i / n_in]).round() as i8).collect();
        let value = |i: usize| match dtype {
            Dtype::F32 => f64::from(f32[i]),
            Dtype::Bf16 => f64::from(bf16[i].to_f32()),
            Dtype::Int8 => f64::from(int8[i]) * f64::from(scales[i / n_in]),
        };
        let values = (0..n_out * n_in).map(value).collect();
        Self { n_out, n_in, values, dtype, f32, bf16, int8, scales }
    }

    pub fn matrix(&self) -> Matrix<'_> {
        let weights = match self.dtype {
            Dtype::F32 => Weights::F32(&self.f32),
            Dtype::Bf16 => Weights::Bf16(&self.bf16),
            Dtype::Int8 => Weights::Int8(&self.int8, &self.scales),
        };
        Matrix::new(weights, self.n_out, self.n_in).unwrap()
    }

    /// The products of `x` with all rows.
    pub fn multiply(&self, x: &[f64]) -> Vec<f64> {
        self.values.chunks(self.n_in).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
    }
}

/// The nearest bfloat16 of finite `x`, of two the one with an even mantissa, by comparing distances.
pub fn round_to_bf16(x: f32) -> f32 {
    let low = x.to_bits() & 0xffff_0000;
    let [low, high] = [low, low + 0x1_0000].map(f32::from_bits);
    let high_value = if high.is_infinite() { 2_f64.powi(128).copysign(f64::from(x)) } else { f64::from(high) };
    let distance = |y: f64| (y - f64::from(x)).abs();
    let low_is_even = low.to_bits() >> 16 & 1 == 0;
    if distance(f64::from(low)) < distance(high_value)
        || distance(f64::from(low)) == distance(high_value) && low_is_even
    {
        low
    } else {
        high
    }
}

pub fn rms_norm(x: &[f64], eps: f64) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    x.iter().map(|x| x / (mean + eps).sqrt()).collect()
}

pub fn softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().copied().fold(f64::MIN, f64::max);
    let exps: Vec<f64> = x.iter().map(|x| (x - max).exp()).collect();
    let sum: f64 = exps.iter().sum();
    exps.iter().map(|x| x / sum).collect()
}

pub fn rotate(head: &[f64], cos: &[f64], sin: &[f64]) -> Vec<f64> {
    let half = head.len() / 2;
    let first = (0..half).map(|i| head[i] * cos[i] + head[i + half] * sin[i]);
    let second = (0..half).map(|i| head[i + half] * cos[i] - head[i] * sin[i]);
    first.chain(second).collect()
}

/// Attention of one query to all `keys` and `values`.
pub fn attend(query: &[f64], keys: &[Vec<f64>], values: &[Vec<f64>]) -> Vec<f64> {
    let dot = |key: &Vec<f64>| query.iter().zip(key).map(|(q, k)| q * k).sum::<f64>() / (query.len() as f64).sqrt();
    let weights = softmax(&keys.iter().map(dot).collect::<Vec<_>>());
    let column = |i: usize| weights.iter().zip(values).map(|(weight, value)| weight * value[i]).sum();
    (0..query.len()).map(column).collect()
}

/// A small model that owns its weights.
pub struct Model {
    pub embedding: OwnedMatrix,
    /// q, k, v, attn_proj, fc, mlp_proj of each layer.
    pub layers: Vec<[OwnedMatrix; 6]>,
    pub head: OwnedMatrix,
    pub config: Config,
    pub cos: Vec<f32>,
    pub sin: Vec<f32>,
}

impl Model {
    pub fn random(dtype: Dtype, n_layer: usize, n_embd: usize, config: Config, vocab_size: usize, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let (q, kv) = (config.n_head * config.head_dim, config.n_kv_head * config.head_dim);
        let mut matrix = |dtype, n_out, n_in: usize| {
            OwnedMatrix::random(dtype, n_out, n_in, 2.0 / (n_in as f32).sqrt(), &mut random)
        };
        let shapes = [(q, n_embd), (kv, n_embd), (kv, n_embd), (n_embd, q), (4 * n_embd, n_embd), (n_embd, 4 * n_embd)];
        let layers = (0..n_layer).map(|_| shapes.map(|(n_out, n_in)| matrix(dtype, n_out, n_in))).collect();
        let embedding_dtype = if dtype == Dtype::Int8 { Dtype::F32 } else { dtype };
        let (embedding, head) = (matrix(embedding_dtype, vocab_size, n_embd), matrix(dtype, vocab_size, n_embd));
        let angle = |i: usize| {
            let (position, pair) = (i / (config.head_dim / 2), i % (config.head_dim / 2));
            position as f32 / 100_f32.powf(2.0 * pair as f32 / config.head_dim as f32)
        };
        let angles: Vec<f32> = (0..128 * config.head_dim / 2).map(angle).collect();
        let (cos, sin) = (angles.iter().map(|x| x.cos()).collect(), angles.iter().map(|x| x.sin()).collect());
        Self { embedding, layers, head, config, cos, sin }
    }

    pub fn layers(&self) -> Vec<Layer<'_>> {
        self.layers
            .iter()
            .map(|[q, k, v, attn_proj, fc, mlp_proj]| Layer {
                qkv: [q.matrix(), k.matrix(), v.matrix()],
                attn_proj: attn_proj.matrix(),
                fc: fc.matrix(),
                mlp_proj: mlp_proj.matrix(),
            })
            .collect()
    }

    /// The logits after each token of one row.
    pub fn logits(&self, ids: &[usize]) -> Vec<Vec<f64>> {
        let Config { n_head, n_kv_head, head_dim: d, eps, softcap } = self.config;
        let (eps, cap) = (f64::from(eps), f64::from(softcap));
        let mut caches: Vec<[Vec<Vec<Vec<f64>>>; 2]> =
            self.layers.iter().map(|_| [vec![vec![]; n_kv_head], vec![vec![]; n_kv_head]]).collect();
        let mut logits = Vec::new();
        for (position, &id) in ids.iter().enumerate() {
            let row = &self.embedding.values[id * self.embedding.n_in..][..self.embedding.n_in];
            let mut x = rms_norm(row, eps);
            let angles = position * d / 2..(position + 1) * d / 2;
            let [cos, sin] =
                [&self.cos, &self.sin].map(|t| t[angles.clone()].iter().map(|&x| f64::from(x)).collect::<Vec<_>>());
            for ([q, k, v, attn_proj, fc, mlp_proj], [keys, values]) in self.layers.iter().zip(&mut caches) {
                let input = rms_norm(&x, eps);
                let rotated = |x: Vec<f64>| -> Vec<Vec<f64>> {
                    x.chunks(d).map(|head| rms_norm(&rotate(head, &cos, &sin), eps)).collect()
                };
                let (queries, value) = (rotated(q.multiply(&input)), v.multiply(&input));
                for (h, key) in rotated(k.multiply(&input)).into_iter().enumerate() {
                    keys[h].push(key);
                    values[h].push(value[h * d..(h + 1) * d].to_vec());
                }
                let head_of = |h: usize| h / (n_head / n_kv_head);
                let y: Vec<f64> =
                    (0..n_head).flat_map(|h| attend(&queries[h], &keys[head_of(h)], &values[head_of(h)])).collect();
                x.iter_mut().zip(attn_proj.multiply(&y)).for_each(|(x, y)| *x += y);
                let hidden: Vec<f64> =
                    fc.multiply(&rms_norm(&x, eps)).iter().map(|x| x.max(0.0) * x.max(0.0)).collect();
                x.iter_mut().zip(mlp_proj.multiply(&hidden)).for_each(|(x, y)| *x += y);
            }
            logits.push(self.head.multiply(&rms_norm(&x, eps)).iter().map(|x| cap * (x / cap).tanh()).collect());
        }
        logits
    }
}

/// The probability of each token under the sampler's settings.
pub fn distribution(sampler: &Sampler, logits: &[f32]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    let mut weights = vec![0.0; logits.len()];
    if sampler.temperature == 0.0 {
        weights[order[0]] = 1.0;
        return weights;
    }
    if sampler.top_k > 0 {
        order.truncate(sampler.top_k);
    }
    let scaled: Vec<f64> = order.iter().map(|&i| f64::from(logits[i]) / f64::from(sampler.temperature)).collect();
    let probabilities = softmax(&scaled);
    let mut before = 0.0;
    for (&token, &p) in order.iter().zip(&probabilities) {
        let in_top_p = sampler.top_p >= 1.0 || before < f64::from(sampler.top_p) || before == 0.0;
        if in_top_p && p >= f64::from(sampler.min_p) * probabilities[0] {
            weights[token] = p;
        }
        before += p;
    }
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / sum).collect()
}

/// Asserts that all values are within `tolerance` of the expected ones, relative to the largest expected value or 1.
#[track_caller]
pub fn assert_close(values: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(values.len(), expected.len(), "{what}");
    let scale = expected.iter().fold(1.0, |max, x| x.abs().max(max));
    for (i, (&x, &y)) in values.iter().zip(expected).enumerate() {
        assert!((f64::from(x) - y).abs() <= tolerance * scale, "{what}: value {i} is {x}, expected {y}");
    }
}

pub fn to_f64(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}
