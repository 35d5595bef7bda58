//! Every kernel against its scalar twin, on every instruction set that the CPU has.

#![allow(clippy::unwrap_used)] // a test may panic

mod twin;

use nanochat_kernels::{Bf16, Error, Isa, Matrix, Sampler, Weights, ops};
use twin::{DTYPES, Dtype, OwnedMatrix, Random, assert_close, to_f64};

/// Float32 sums of some hundred products.
const TOLERANCE: f64 = 3e-6;

#[test]
fn products() {
    let mut random = Random::new(1);
    // Lengths in and between multiples of 16 and 32, below and above the one-row threshold (256) and the one at which
    // fewer vectors stay in the cache (1536); all remainders of the blocks.
    let shapes = [(1, 16), (2, 32), (7, 64), (5, 96), (9, 48), (6, 24), (3, 1), (11, 104), (13, 256), (5, 1600)];
    let shapes = if cfg!(miri) { &shapes[..6] } else { &shapes[..] };
    let counts: &[usize] = if cfg!(miri) { &[1, 3, 8] } else { &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 13, 18, 19, 25] };
    for isa in Isa::available() {
        for (dtype, &(n_out, n_in)) in DTYPES.into_iter().flat_map(|dtype| shapes.iter().map(move |s| (dtype, s))) {
            let owned = OwnedMatrix::random(dtype, n_out, n_in, 1.0, &mut random);
            let matrix = owned.matrix();
            let rounds = isa == Isa::Avx512Bf16 && dtype == Dtype::Bf16 && n_in.is_multiple_of(32);
            for &n in counts {
                let vectors = random.values(n * n_in);
                let mut out = vec![f32::NAN; n * n_out];
                matrix.multiply(isa, &vectors, &mut out).unwrap();
                for (vector, products) in vectors.chunks(n_in).zip(out.chunks(n_out)) {
                    let seen: Vec<f32> =
                        vector.iter().map(|&x| if rounds { twin::round_to_bf16(x) } else { x }).collect();
                    let what = format!("{isa:?} {dtype:?} {n} x ({n_out}, {n_in})");
                    let tolerance = TOLERANCE * (n_in as f64).sqrt().max(1.0);
                    assert_close(products, &owned.multiply(&to_f64(&seen)), tolerance, &what);
                    let mut alone = vec![f32::NAN; n_out];
                    matrix.multiply(isa, vector, &mut alone).unwrap();
                    assert_eq!(alone, products, "{what}: depends on the other vectors");
                }
            }
        }
    }
}

#[test]
fn wrong_lengths_are_errors() {
    let length = |name, given, expected| Error::Length { name, given, expected: Some(expected) };
    assert_eq!(Matrix::new(Weights::F32(&[0.0; 5]), 2, 3).unwrap_err(), length("weights", 5, 6));
    assert_eq!(Matrix::new(Weights::Int8(&[0; 6], &[0.0]), 2, 3).unwrap_err(), length("scales", 1, 2));
    assert!(Matrix::new(Weights::F32(&[]), usize::MAX, 2).is_err());
    let matrix = Matrix::new(Weights::F32(&[0.0; 6]), 2, 3).unwrap();
    assert_eq!(matrix.multiply(Isa::Portable, &[0.0; 4], &mut [0.0; 2]).unwrap_err(), length("vectors", 4, 3));
    assert_eq!(matrix.multiply(Isa::Portable, &[0.0; 3], &mut [0.0; 3]).unwrap_err(), length("out", 3, 2));
    assert!(Isa::available().any(|isa| isa == Isa::detect()));
    for isa in [Isa::Fma, Isa::Avx512, Isa::Avx512Bf16].into_iter().filter(|isa| !isa.is_available()) {
        assert_eq!(ops::exp(isa, &mut []), Err(Error::Isa(isa)));
    }
}

#[test]
fn exponentials() {
    let n = if cfg!(miri) { 101 } else { 20_001 };
    let inputs: Vec<f32> = (0..n).map(|i| -87.0 + 175.0 * i as f32 / (n - 1) as f32).collect();
    for isa in Isa::available() {
        let mut values = inputs.clone();
        ops::exp(isa, &mut values).unwrap();
        for (&x, &y) in inputs.iter().zip(&values) {
            let expected = f64::from(x).exp();
            assert!((f64::from(y) / expected - 1.0).abs() < 2e-7, "{isa:?}: exp({x}) = {y}");
        }
        let mut special = [0.0, 1000.0, -1000.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
        ops::exp(isa, &mut special).unwrap();
        assert_eq!(special[0], 1.0);
        assert_eq!((special[1], special[2]), (special[3], special[4])); // clamped
        assert!(special[5].is_nan());
    }
}

#[test]
fn soft_caps_and_softmax() {
    let mut random = Random::new(2);
    for isa in Isa::available() {
        for n in [1, 3, 15, 16, 17, 64, 100] {
            let x: Vec<f32> = random.values(n).iter().map(|x| x * 40.0).collect();
            let mut capped = x.clone();
            ops::softcap(isa, &mut capped, 15.0).unwrap();
            let expected: Vec<f64> = x.iter().map(|&x| 15.0 * (f64::from(x) / 15.0).tanh()).collect();
            assert_close(&capped, &expected, 1e-6, &format!("{isa:?} softcap of {n}"));
            let mut probabilities = x.clone();
            ops::softmax(isa, &mut probabilities).unwrap();
            assert_close(&probabilities, &twin::softmax(&to_f64(&x)), 1e-6, &format!("{isa:?} softmax of {n}"));
        }
    }
}

#[test]
fn norms_and_rotations() {
    let mut random = Random::new(3);
    for n in [2, 6, 16, 30, 104, 128] {
        let x = random.values(n);
        let mut normed = x.clone();
        ops::rms_norm(&mut normed, 1e-5);
        assert_close(&normed, &twin::rms_norm(&to_f64(&x), 1e-5), 1e-6, &format!("norm of {n}"));
        let (cos, sin) = (random.values(n / 2), random.values(n / 2));
        let mut rotated = x.clone();
        ops::rotate(&mut rotated, &cos, &sin);
        let expected = twin::rotate(&to_f64(&x), &to_f64(&cos), &to_f64(&sin));
        assert_close(&rotated, &expected, 1e-6, &format!("rotation of {n}"));
    }
}

#[test]
fn bfloat16_is_the_nearest() {
    let mut random = Random::new(4);
    let ties = [0x3f80_8000, 0x3f81_8000, 0x3f80_7fff, 0x3f80_8001, 0x7f7f_8000, 0xff7f_8000, 0, 0x8000_0000, 1];
    let uniform = random.values(if cfg!(miri) { 50 } else { 20_000 });
    let inputs: Vec<f32> = ties.into_iter().map(f32::from_bits).chain(uniform.iter().map(|x| x * x * 1e3)).collect();
    let mut rounded = vec![Bf16::default(); inputs.len()];
    ops::round_to_bf16(&inputs, &mut rounded);
    for (&x, &y) in inputs.iter().zip(&rounded) {
        assert_eq!(y.to_f32().to_bits(), twin::round_to_bf16(x).to_bits(), "{x}");
    }
}

#[test]
fn attention_to_cached_keys() {
    let mut random = Random::new(5);
    let shapes = [(16, 1, 1, 1), (16, 2, 5, 3), (24, 1, 9, 8), (64, 3, 40, 2), (32, 4, 33, 8), (128, 1, 100, 1)];
    for &(d, group, columns, tokens) in if cfg!(miri) { &shapes[..3] } else { &shapes[..] } {
        let (queries, keys, values) =
            (random.values(tokens * group * d), random.values(columns * d), random.values(columns * d));
        let bf16 = |x: &[f32]| x.iter().map(|&x| Bf16::from_f32(x)).collect::<Vec<_>>();
        let (keys_bf16, values_bf16) = (bf16(&keys), bf16(&values));
        for isa in Isa::available() {
            for in_bf16 in [false, true] {
                let mut out = vec![f32::NAN; queries.len()];
                let rounds = in_bf16 && isa == Isa::Avx512Bf16 && d % 32 == 0;
                if in_bf16 {
                    ops::attention(isa, &queries, &keys_bf16, &values_bf16, d, group, &mut out).unwrap();
                } else {
                    ops::attention(isa, &queries, &keys, &values, d, group, &mut out).unwrap();
                }
                let rows = |x: &[f32]| -> Vec<Vec<f64>> {
                    let seen = x.iter().map(|&x| f64::from(if in_bf16 { twin::round_to_bf16(x) } else { x }));
                    seen.collect::<Vec<_>>().chunks(d).map(<[f64]>::to_vec).collect()
                };
                let (keys, values) = (rows(&keys), rows(&values));
                for (i, (query, result)) in queries.chunks(d).zip(out.chunks(d)).enumerate() {
                    let seen: Vec<f32> =
                        query.iter().map(|&x| if rounds { twin::round_to_bf16(x) } else { x }).collect();
                    let visible = columns - tokens + 1 + i / group;
                    let expected = twin::attend(&to_f64(&seen), &keys[..visible], &values[..visible]);
                    assert_close(result, &expected, TOLERANCE, &format!("{isa:?} bf16={in_bf16} d={d} query {i}"));
                }
            }
        }
    }
    let attention = |queries: usize, keys: usize, values: usize, d, group, out: usize| {
        let (queries, keys, values) = (vec![0.0; queries], vec![0.0_f32; keys], vec![0.0; values]);
        ops::attention(Isa::Portable, &queries, &keys, &values, d, group, &mut vec![0.0; out])
    };
    assert_eq!(attention(0, 0, 0, 4, 1, 0), Ok(()));
    for wrong in [(8, 4, 4, 4, 1, 8), (4, 5, 5, 4, 1, 4), (4, 8, 4, 4, 1, 4), (4, 4, 4, 4, 1, 8), (4, 4, 4, 0, 1, 4)] {
        assert!(attention(wrong.0, wrong.1, wrong.2, wrong.3, wrong.4, wrong.5).is_err(), "{wrong:?}");
    }
}

#[test]
fn samples_follow_the_distribution() {
    let mut random = Random::new(6);
    let plain = Sampler { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };
    let samplers = [
        Sampler { temperature: 0.0, ..plain },
        plain,
        Sampler { temperature: 0.3, ..plain },
        Sampler { top_k: 1, ..plain },
        Sampler { top_k: 5, ..plain },
        Sampler { top_k: 1000, ..plain },
        Sampler { top_p: 0.0, ..plain },
        Sampler { top_p: 0.7, ..plain },
        Sampler { min_p: 0.2, ..plain },
        Sampler { temperature: 1.5, top_k: 20, top_p: 0.9, min_p: 0.05 },
    ];
    for size in if cfg!(miri) { [1, 20, 70] } else { [1, 50, 700] } {
        let logits: Vec<f32> = random.values(size).iter().map(|x| x * 5.0).collect();
        for sampler in samplers {
            let distribution = twin::distribution(&sampler, &logits);
            // Equally spaced quantiles give each token its share.
            let n = if cfg!(miri) { 50 } else { 20_000 };
            let mut counts = vec![0.0; size];
            for i in 0..n {
                let token = sampler.sample(&logits, (i as f32 + 0.5) / n as f32).unwrap();
                assert!(distribution[token] > 0.0, "{sampler:?} sampled {token}");
                counts[token] += 1.0;
            }
            for (count, p) in counts.iter().zip(&distribution) {
                assert!((count - p * f64::from(n)).abs() < 2.0 + 1e-4 * f64::from(n), "{sampler:?}: {count}, {p}");
            }
        }
    }
    assert_eq!(plain.sample(&[], 0.5), None);
    assert_eq!(Sampler { temperature: 0.0, ..plain }.sample(&[1.0, 3.0, 3.0], 0.0), Some(1)); // a tie
    assert_eq!(plain.sample(&[0.0, -200.0], 0.999_999), Some(0)); // e^-200 is 0
}
