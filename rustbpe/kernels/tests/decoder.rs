//! The whole forward pass against its scalar twin, and against itself in other batches, chunks and threads.

#![allow(clippy::unwrap_used)] // a test may panic

mod twin;

use nanochat_kernels::{Bf16, CacheData, Config, Decoder, Error, Isa, KvCache, Matrix, RotaryTables, Weights};
use twin::{DTYPES, Dtype, Model, Random, assert_close};

const COLUMNS: usize = 80;
const VOCAB_SIZE: usize = 40;

fn config(n_head: usize, n_kv_head: usize, head_dim: usize) -> Config {
    Config { n_head, n_kv_head, head_dim, eps: 1e-6, softcap: 15.0 }
}

fn decoder(model: &Model) -> Decoder<'_> {
    Decoder::new(model.embedding.matrix(), model.layers(), model.head.matrix(), model.config).unwrap()
}

/// A cache that owns its elements.
struct Cache {
    f32: Vec<f32>,
    bf16: Vec<Bf16>,
    shape: [usize; 6],
    lengths: Vec<usize>,
}

impl Cache {
    fn new(model: &Model, rows: usize, in_bf16: bool) -> Self {
        let Config { n_kv_head, head_dim, .. } = model.config;
        let shape = [model.layers.len(), 2, rows, n_kv_head, COLUMNS, head_dim];
        let n = shape.iter().product();
        let (f32, bf16) = if in_bf16 { (0, n) } else { (n, 0) };
        Self { f32: vec![0.0; f32], bf16: vec![Bf16::default(); bf16], shape, lengths: vec![0; rows] }
    }

    /// Appends tokens; returns the logits after each if they are wanted.
    fn forward(
        &mut self,
        decoder: &Decoder<'_>,
        model: &Model,
        tokens: &[Vec<usize>],
        with_logits: bool,
        threads: usize,
    ) -> Vec<f32> {
        let n: usize = tokens.iter().map(Vec::len).sum();
        let mut logits = vec![f32::NAN; n * decoder.vocab_size()];
        let data = if self.bf16.is_empty() { CacheData::F32(&mut self.f32) } else { CacheData::Bf16(&mut self.bf16) };
        let mut cache = KvCache::new(data, self.shape).unwrap();
        let rotary = RotaryTables { cos: &model.cos, sin: &model.sin };
        let wanted = with_logits.then_some(&mut logits[..]);
        decoder.forward(tokens, &self.lengths, &mut cache, rotary, wanted, threads).unwrap();
        self.lengths.iter_mut().zip(tokens).for_each(|(length, ids)| *length += ids.len());
        logits
    }
}

fn random_ids(random: &mut Random, n: usize) -> Vec<usize> {
    (0..n).map(|_| random.below(VOCAB_SIZE)).collect()
}

#[test]
fn logits_equal_the_twins() {
    let mut random = Random::new(1);
    let shapes =
        [(2, 32, config(2, 1, 16)), (2, 64, config(4, 2, 16)), (1, 96, config(4, 4, 24)), (2, 64, config(2, 2, 32))];
    let small = [(1, 16, config(1, 1, 16))];
    for (i, &(n_layer, n_embd, config)) in if cfg!(miri) { &small[..] } else { &shapes[..] }.iter().enumerate() {
        for dtype in DTYPES {
            let model = Model::random(dtype, n_layer, n_embd, config, VOCAB_SIZE, i as u64);
            let ids = random_ids(&mut random, if cfg!(miri) { 2 } else { 21 });
            let expected: Vec<f64> = model.logits(&ids).concat();
            for isa in Isa::available() {
                for cache_in_bf16 in [false, true] {
                    let decoder = decoder(&model).with_isa(isa).unwrap();
                    let mut cache = Cache::new(&model, 1, cache_in_bf16);
                    let logits = cache.forward(&decoder, &model, std::slice::from_ref(&ids), true, 1);
                    let rounds = cache_in_bf16 || isa == Isa::Avx512Bf16 && dtype == Dtype::Bf16;
                    let tolerance = if rounds { 2e-2 } else { 1e-5 };
                    assert_close(&logits, &expected, tolerance, &format!("{isa:?} {dtype:?} bf16={cache_in_bf16} {i}"));
                }
            }
        }
    }
}

#[test]
fn logits_depend_neither_on_other_rows_nor_on_chunks_nor_on_threads() {
    let mut random = Random::new(2);
    let (n_embd, lengths) = if cfg!(miri) { (16, &[1, 2][..]) } else { (256, &[1, 9, 40, 17, 64][..]) };
    let config = if cfg!(miri) { config(2, 1, 8) } else { config(16, 8, 16) };
    for dtype in if cfg!(miri) { &DTYPES[1..2] } else { &DTYPES[..] } {
        let model = Model::random(*dtype, 2, n_embd, config, VOCAB_SIZE, 7);
        let prompts: Vec<Vec<usize>> = lengths.iter().map(|&n| random_ids(&mut random, n)).collect();
        let last: Vec<Vec<usize>> = prompts.iter().map(|_| random_ids(&mut random, 1)).collect();
        for isa in Isa::available() {
            let decoder = decoder(&model).with_isa(isa).unwrap();
            let expected: Vec<f32> = prompts
                .iter()
                .zip(&last)
                .flat_map(|(prompt, last)| {
                    let mut cache = Cache::new(&model, 1, true);
                    cache.forward(&decoder, &model, std::slice::from_ref(prompt), false, 1);
                    cache.forward(&decoder, &model, std::slice::from_ref(last), true, 1)
                })
                .collect();
            for &(threads, chunk) in if cfg!(miri) { &[(2, 2)][..] } else { &[(1, 100), (2, 100), (3, 100), (2, 7)] } {
                let mut cache = Cache::new(&model, prompts.len(), true);
                let mut prompts = prompts.clone();
                while prompts.iter().any(|prompt| !prompt.is_empty()) {
                    let next = prompts.iter_mut().map(|prompt| prompt.drain(..chunk.min(prompt.len())).collect());
                    let next: Vec<Vec<usize>> = next.collect();
                    cache.forward(&decoder, &model, &next, false, threads);
                }
                let logits = cache.forward(&decoder, &model, &last, true, threads);
                assert!(logits == expected, "{isa:?} {dtype:?}, {threads} threads, chunks of {chunk}");
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_an_error() {
    let model = Model::random(Dtype::F32, 1, 32, config(2, 1, 16), VOCAB_SIZE, 1);
    let decoder = decoder(&model);
    let forward = |tokens: &[Vec<usize>], lengths: &[usize], shape: [usize; 6], positions: usize, logits: usize| {
        let mut data = vec![0.0; shape.iter().product()];
        let mut cache = KvCache::new(CacheData::F32(&mut data), shape).unwrap();
        let rotary = RotaryTables { cos: &model.cos[..positions * 8], sin: &model.sin };
        let mut logits = vec![0.0; logits];
        decoder.forward(tokens, lengths, &mut cache, rotary, Some(&mut logits), 1)
    };
    let shape = [1, 2, 1, 1, 7, 16];
    assert_eq!(forward(&[vec![1]], &[6], shape, 7, 40), Ok(()));
    assert_eq!(forward(&[vec![]], &[6], shape, 7, 0), Ok(()));
    assert_eq!(forward(&[], &[], shape, 7, 0), Ok(()));
    assert!(matches!(forward(&[vec![40]], &[6], shape, 7, 40), Err(Error::Token { id: 40, vocab_size: 40 })));
    assert!(matches!(forward(&[vec![1]], &[7], shape, 8, 40), Err(Error::CacheFull { columns: 8, .. })));
    assert!(matches!(forward(&[vec![1]], &[usize::MAX], shape, 8, 40), Err(Error::CacheFull { .. })));
    assert!(matches!(forward(&[vec![1], vec![1]], &[0, 0], shape, 7, 80), Err(Error::CacheFull { rows: 2, .. })));
    assert!(matches!(forward(&[vec![1]], &[6], [2, 2, 1, 1, 7, 16], 7, 40), Err(Error::Shape { .. })));
    assert!(matches!(forward(&[vec![1]], &[6], shape, 6, 40), Err(Error::Length { name: "cos", .. })));
    assert!(matches!(forward(&[vec![1]], &[6], shape, 7, 41), Err(Error::Length { name: "logits", .. })));
    assert!(matches!(forward(&[vec![1]], &[], shape, 7, 40), Err(Error::Length { name: "lengths", .. })));
    assert!(KvCache::new(CacheData::F32(&mut [0.0; 3]), shape).is_err());

    let new = |n_head, n_kv_head, head_dim, n_layer: usize| {
        let layers = model.layers()[..n_layer].to_vec();
        Decoder::new(model.embedding.matrix(), layers, model.head.matrix(), config(n_head, n_kv_head, head_dim))
    };
    assert!(new(2, 1, 16, 1).is_ok());
    let name = |result: Result<Decoder<'_>, Error>| match result {
        Err(Error::Config { name, .. }) => name.to_string(),
        Err(Error::Shape { name, .. }) => name,
        other => format!("{other:?}"),
    };
    assert_eq!(name(new(2, 0, 16, 1)), "n_kv_head");
    assert_eq!(name(new(3, 2, 16, 1)), "n_kv_head");
    assert_eq!(name(new(0, 1, 16, 1)), "n_head");
    assert_eq!(name(new(2, 1, 15, 1)), "head_dim");
    assert_eq!(name(new(2, 1, 16, 0)), "n_layer");
    assert_eq!(name(new(4, 2, 16, 1)), "layer 0, q");
    assert_eq!(name(new(2, 2, 16, 1)), "layer 0, k");
    let head = Matrix::new(Weights::F32(&[0.0; 64]), 1, 64).unwrap();
    assert_eq!(name(Decoder::new(model.embedding.matrix(), model.layers(), head, model.config)), "head");
}
