//! Exact, parallel training of byte-level BPE tokenizers.
//!
//! Training has three steps: [`Splitter`] splits text into pieces, [`WordCounter`] counts the distinct pieces on all
//! threads, and [`train`] finds the merges. [`Tokenizer`] encodes with them and lists the tokens' bytes.
//!
//! ```
//! use rustbpe::{Error, GPT4_PATTERN, Splitter, Tokenizer, WordCounts, train};
//!
//! let splitter = Splitter::new(GPT4_PATTERN)?;
//! let words = WordCounts::of(&splitter, ["low lower lowest"])?;
//! let merges = train(words, 260, |_| Ok::<(), Error>(()))?;
//! let tokenizer = Tokenizer::new(splitter, merges);
//! assert_eq!(tokenizer.encode("slow")?, [b's'.into(), 257]);
//! # Ok::<(), Error>(())
//! ```
#![deny(missing_docs)]
#![forbid(unsafe_code)]

mod error;
mod key;
mod scanner;
mod split;
mod tokenizer;
mod trainer;
mod words;

pub use error::Error;
pub use split::{GPT4_PATTERN, Splitter};
pub use tokenizer::Tokenizer;
pub use trainer::{Pair, train};
pub use words::{Texts, WordCounter, WordCounts};
