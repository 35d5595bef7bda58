//! Splitting, counting, merging and encoding, each alone: `cargo bench`.
//!
//! The text is the pocket world's file, or the one that BENCH_TEXT names.

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use rustbpe::{Error, GPT4_PATTERN, Splitter, Tokenizer, WordCounts, train};

fn text() -> String {
    match std::env::var("BENCH_TEXT") {
        Ok(path) => std::fs::read_to_string(path).expect("BENCH_TEXT names a text file"),
        Err(_) => include_str!("../../nanochat/pocket_world.txt").repeat(50),
    }
}

fn benches(c: &mut Criterion) {
    let text = text();
    let texts: Vec<&str> = text.split_inclusive("\n\n").collect();
    let splitter = Splitter::new(GPT4_PATTERN).unwrap();
    let regex = Splitter::new(&format!("(?:{GPT4_PATTERN})")).unwrap(); // not known, so it goes to the regex engine
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
    group.bench_function("encode a batch", |b| b.iter(|| tokenizer.encode_batch(&texts)));
    group.finish();
}

criterion_group!(all, benches);
criterion_main!(all);
