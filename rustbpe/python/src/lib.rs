//! The Python extension module `rustbpe`: byte-level BPE and the CPU kernels of nanochat.
//!
//! The modules convert arguments, release the interpreter for heavy work, and map errors to Python exceptions.
#![deny(missing_docs)]

mod arrow;
mod kernels;
mod tensors;
mod tokenizer;

use std::fmt::Display;

use pyo3::PyErr;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::pymodule;

/// A ValueError with the message of `error`.
fn value_error(error: impl Display) -> PyErr {
    PyValueError::new_err(error.to_string())
}

/// Byte-level BPE training and encoding, and a Transformer's decoding on CPUs, in Rust.
#[pymodule(name = "rustbpe")]
mod extension {
    #[pymodule_export]
    use crate::kernels::{Decoder, sample};
    #[pymodule_export]
    use crate::tokenizer::Tokenizer;
}
