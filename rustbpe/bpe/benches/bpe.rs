//! Splitting, counting, merging and encoding, each alone: `cargo bench -p rustbpe`.
//!
//! The text is generated, or read from the file in BENCH_TEXT.

#![allow(clippy::expect_used, clippy::unwrap_used)] // a bench may panic

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use rustbpe::{Error, GPT4_PATTERN, Splitter, Tokenizer, WordCounts, train};

fn text() -> String {
    match std::env::var("BENCH_TEXT") {
        Ok(path) => std::fs::read_to_string(path).expect("BENCH_TEXT names a text file"),
        Err(_) => generated_text(1 << 23),
    }
}

/// About `len` bytes of words from a vocabulary of 50,000, distributed roughly as in natural text.
fn generated_text(len: usize) -> String {
    let mut state = 1_u64;
    let mut random = |n: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n
    };
    let syllables = ["an", "be", "co", "di", "er", "fo", "ing", "lu", "ma", "ne", "or", "pre", "ri", "st", "ti", "un"];
    let word = |_| (0..1 + random(4)).map(|_| syllables[random(16)]).collect();
    let words: Vec<String> = (0..50_000).map(word).collect();
    let mut text = String::new();
    while text.len() < len {
        let limit = 1 + random(words.len());
        text += &words[random(limit)];
        text += [" ", " ", " ", " ", ", ", ". ", " 12 ", "\n\n"][random(8)];
    }
    text
}

fn benches(c: &mut Criterion) {
    let text = text();
    let texts: Vec<&str> = text.split_inclusive("\n\n").collect();
    let splitter = Splitter::new(GPT4_PATTERN).unwrap();
    let regex = Splitter::new(&format!("(?:{GPT4_PATTERN})")).unwrap(); // unknown, so it goes to the regex engine
    let count = || WordCounts::of(&splitter, &texts).unwrap();
    let merges = train(count(), 8192, |_| Ok::<(), Error>(())).unwrap();
    let tokenizer = Tokenizer::new(splitter.clone(), merges);

    let mut group = c.benchmark_group("bpe");
    group.sample_size(20).throughput(Throughput::Bytes(text.len() as u64));
    for (name, splitter) in [("split", &splitter), ("split with the regex", &regex)] {
        group.bench_function(name, |b| {
            b.iter(|| {
                let mut pieces = 0;
                splitter.split(&text, |_| pieces += 1).unwrap();
                pieces
            });
        });
    }
    group.bench_function("count", |b| b.iter(count));
    group.bench_function("merge", |b| {
        b.iter_batched(count, |words| train(words, 8192, |_| Ok::<(), Error>(())), BatchSize::LargeInput);
    });
    group.bench_function("encode", |b| b.iter(|| tokenizer.encode(&text)));
    group.bench_function("encode a batch", |b| b.iter(|| tokenizer.encode_batch(&texts, 0.0)));
    group.finish();
}

criterion_group!(all, benches);
criterion_main!(all);
