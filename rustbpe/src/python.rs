//! The Python module: converts, frees the interpreter for all heavy work, and maps errors.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyBytes, PyIterator};

use crate::{Error, GPT4_PATTERN, Splitter, WordCounts, train};

impl From<Error> for PyErr {
    fn from(e: Error) -> Self {
        PyValueError::new_err(e.to_string())
    }
}

/// A byte-level BPE tokenizer: knows the 256 bytes until it is trained.
#[pyclass(module = "rustbpe")]
struct Tokenizer(crate::Tokenizer);

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> PyResult<Self> {
        Ok(Self(crate::Tokenizer::new(Splitter::new(GPT4_PATTERN)?, Vec::new())))
    }

    /// Learn at most `vocab_size - 256` merges from an iterator of str.
    ///
    /// Texts are taken `buffer_size` at a time; while they are counted, on all cores, other threads can run.
    /// `pattern` is the regular expression that cuts text into pieces (default: GPT-4's with digits in groups of 1-2).
    /// `progress(merges_done, merges_wanted)`, if given, is called about ten times a second while merging.
    /// Raises ValueError for a bad pattern or size, TypeError for items that are not str, and whatever the iterator
    /// raises; the tokenizer is then as it was before.
    #[pyo3(signature = (iterator, vocab_size, buffer_size=8192, pattern=None, progress=None))]
    fn train_from_iterator(
        &mut self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: i64,
        buffer_size: usize,
        pattern: Option<&str>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        let Ok(vocab_size @ 256..) = u32::try_from(vocab_size) else {
            return Err(PyValueError::new_err(format!("vocab_size={vocab_size} is not between 256 and {}", u32::MAX)));
        };
        let splitter = Splitter::new(pattern.unwrap_or(GPT4_PATTERN))?;
        let words = WordCounts::new(splitter.pattern())?;
        let words = count_words(py, &iterator.try_iter()?, buffer_size.max(1), words)?;
        let tick = |done: usize| {
            Python::attach(|py| {
                py.check_signals()?;
                progress.as_ref().map_or(Ok(()), |f| f.call1(py, (done, vocab_size - 256)).map(drop))
            })
        };
        let merges = py.detach(|| train(words, vocab_size, tick))?;
        self.0 = crate::Tokenizer::new(splitter, merges);
        Ok(())
    }

    /// The regular expression that cuts text into pieces.
    fn get_pattern(&self) -> &str {
        self.0.pattern()
    }

    /// [(bytes, rank)] in the order of the ranks, as tiktoken wants them; no bytes occur twice.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, usize)> {
        let tokens = self.0.token_bytes();
        tokens.iter().enumerate().map(|(rank, bytes)| (PyBytes::new(py, bytes), rank)).collect()
    }

    /// The token ids of `text`.
    fn encode(&self, py: Python<'_>, text: &str) -> PyResult<Vec<u32>> {
        Ok(py.detach(|| self.0.encode(text))?)
    }
}

/// Drains the iterator: fill a buffer with the interpreter, count it without.
fn count_words(
    py: Python<'_>,
    iterator: &Bound<'_, PyIterator>,
    buffer_size: usize,
    mut words: WordCounts,
) -> PyResult<WordCounts> {
    const BUFFER_BYTES: usize = 64 << 20; // books, not only pages, may come in: keep memory flat
    let mut buffer: Vec<PyBackedStr> = Vec::new();
    let mut bytes = 0;
    let mut count = |buffer: &mut Vec<PyBackedStr>| {
        py.detach(|| words.add_texts(buffer))?;
        buffer.clear();
        py.check_signals()
    };
    for text in iterator {
        let text: PyBackedStr = text?.extract()?;
        bytes += text.len();
        buffer.push(text);
        if buffer.len() >= buffer_size || bytes >= BUFFER_BYTES {
            count(&mut buffer)?;
            bytes = 0;
        }
    }
    count(&mut buffer)?;
    Ok(words)
}

/// Byte-level BPE training and encoding in Rust.
#[pymodule]
mod rustbpe {
    #[pymodule_export]
    use super::Tokenizer;
}
