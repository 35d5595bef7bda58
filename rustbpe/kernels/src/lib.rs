//! nanochat's Transformer on CPUs: the forward pass over a KV cache, and sampling from its logits.
//!
//! [`Decoder`] is the forward pass, [`Sampler`] draws tokens. [`Matrix::multiply`] and [`ops`] are the kernels under
//! them, for tests and benches. Everything is on slices; the crate knows no Python and no tensors.
//!
//! Kernels are compiled for each instruction set in [`Isa`], and the fastest one of the CPU is used.
//!
//! ```
//! use nanochat_kernels::{Isa, Matrix, Weights};
//!
//! let matrix = Matrix::new(Weights::F32(&[1.0, 2.0, 3.0, 4.0]), 2, 2)?;
//! let mut out = [0.0; 2];
//! matrix.multiply(Isa::detect(), &[1.0, 10.0], &mut out)?;
//! assert_eq!(out, [21.0, 43.0]);
//! # Ok::<(), nanochat_kernels::Error>(())
//! ```
#![deny(missing_docs)]

mod attention;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod decoder;
mod element;
mod error;
mod forward;
mod isa;
mod kv_cache;
mod matmul;
mod memory;
pub mod ops;
mod sampler;
mod schedule;
mod simd;
mod vector;

pub use decoder::{Config, Decoder, Layer};
pub use element::{Bf16, CacheElement, Element};
pub use error::Error;
pub use forward::RotaryTables;
pub use isa::Isa;
pub use kv_cache::{CacheData, KvCache};
pub use matmul::{Matrix, Weights};
pub use sampler::Sampler;
