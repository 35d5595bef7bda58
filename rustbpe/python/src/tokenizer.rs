//! Training of BPE tokenizers, and encoding with them.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::{PyBackedBytes, PyBackedStr};
use pyo3::types::{PyBytes, PyString};
use rustbpe::{GPT4_PATTERN, Splitter, Texts, WordCounter, train};

use crate::{arrow, value_error};

/// A byte-level BPE tokenizer. Until it is trained, its tokens are the 256 bytes.
#[pyclass(module = "rustbpe")]
pub(crate) struct Tokenizer(rustbpe::Tokenizer);

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> PyResult<Self> {
        Ok(Self(rustbpe::Tokenizer::new(splitter(None)?, Vec::new())))
    }

    /// A tokenizer from the bytes of its tokens in the order of their ids, as get_mergeable_ranks lists them.
    ///
    /// Raises ValueError unless they are the 256 bytes followed by tokens that merge two earlier ones.
    #[staticmethod]
    #[pyo3(signature = (tokens, pattern=None))]
    fn from_tokens(tokens: Vec<PyBackedBytes>, pattern: Option<&str>) -> PyResult<Self> {
        rustbpe::Tokenizer::from_tokens(splitter(pattern)?, &tokens).map(Self).map_err(value_error)
    }

    /// Learn up to `vocab_size - 256` merges from an iterable of str.
    ///
    /// Reading overlaps with counting on all cores, and other Python threads can run. Only the first `max_chars`
    /// characters of each text are read. `pattern` is the regular expression that splits text into pieces; the default
    /// is GPT-4's with digits in groups of 1 or 2. `progress(phase, done, total)` is called now and then: phase is
    /// "counting" (done in bytes, total None) or "merging" (done and total in merges). `buffer_size` is ignored; other
    /// trainers have it.
    ///
    /// Raises ValueError for a bad pattern or size, TypeError for items that are not str, UnicodeEncodeError for lone
    /// surrogates, and what the iterator raises. The tokenizer is then unchanged.
    #[pyo3(signature = (iterator, vocab_size, buffer_size=8192, pattern=None, progress=None, max_chars=None))]
    #[allow(clippy::too_many_arguments)] // they have names in Python
    fn train_from_iterator(
        &mut self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: i64,
        #[allow(unused_variables)] buffer_size: usize,
        pattern: Option<&str>,
        progress: Option<Py<PyAny>>,
        max_chars: Option<usize>,
    ) -> PyResult<()> {
        let mut training = Training::new(py, vocab_size, pattern, progress, max_chars)?;
        for text in iterator.try_iter()? {
            let text = text?.cast_into::<PyString>()?;
            if text.call_method0("isascii")?.extract()? {
                training.add(text.to_str()?)?;
            } else {
                // to_str would cache the UTF-8 in the str, which doubles the memory of texts that stay alive.
                training.add(utf8(text.encode_utf8()?.as_bytes())?)?;
            }
        }
        self.0 = training.finish()?;
        Ok(())
    }

    /// Learn merges from pyarrow, without a Python string per text; nulls count as empty texts.
    ///
    /// `batches` is an iterable of string Arrays or ChunkedArrays, or of RecordBatches or Tables with a string column
    /// `column`. The rest is as for train_from_iterator.
    #[pyo3(signature = (batches, vocab_size, column="text", pattern=None, progress=None, max_chars=None))]
    #[allow(clippy::too_many_arguments)]
    fn train_from_arrow(
        &mut self,
        py: Python<'_>,
        batches: &Bound<'_, PyAny>,
        vocab_size: i64,
        column: &str,
        pattern: Option<&str>,
        progress: Option<Py<PyAny>>,
        max_chars: Option<usize>,
    ) -> PyResult<()> {
        let mut training = Training::new(py, vocab_size, pattern, progress, max_chars)?;
        for batch in batches.try_iter()? {
            arrow::for_each_text(batch?, column, |text| training.add(utf8(text)?))?;
        }
        self.0 = training.finish()?;
        Ok(())
    }

    /// The regular expression that splits text into pieces.
    fn get_pattern(&self) -> &str {
        self.0.pattern()
    }

    /// [(bytes, rank)] in the order of the ranks, for tiktoken. No bytes occur twice.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, usize)> {
        let tokens = self.0.token_bytes();
        tokens.iter().enumerate().map(|(rank, bytes)| (PyBytes::new(py, bytes), rank)).collect()
    }

    /// The token ids of `text`. Names of special tokens are treated as plain text.
    ///
    /// With `dropout` > 0, each possible merge is left out with that probability (BPE dropout, Provilkov et al. 2020).
    /// Equal texts get equal ids.
    #[pyo3(signature = (text, dropout=0.0))]
    fn encode(&self, py: Python<'_>, text: &str, dropout: f64) -> PyResult<Vec<u32>> {
        let encode = || if dropout > 0.0 { self.0.encode_dropping(text, dropout) } else { self.0.encode(text) };
        py.detach(encode).map_err(value_error)
    }

    /// The token ids of each text, on `num_threads` threads (default: all cores). `dropout` is that of encode.
    #[pyo3(signature = (texts, num_threads=None, dropout=0.0))]
    fn encode_batch(
        &self,
        py: Python<'_>,
        texts: Vec<PyBackedStr>,
        num_threads: Option<usize>,
        dropout: f64,
    ) -> PyResult<Vec<Vec<u32>>> {
        let encode = || self.0.encode_batch(&texts, dropout).map_err(value_error);
        py.detach(|| match num_threads {
            None => encode(),
            Some(n) => {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build();
                pool.map_err(|e| value_error(format!("num_threads={n}: {e}")))?.install(encode)
            }
        })
    }
}

fn splitter(pattern: Option<&str>) -> PyResult<Splitter> {
    Splitter::new(pattern.unwrap_or(GPT4_PATTERN)).map_err(value_error)
}

fn utf8(bytes: &[u8]) -> PyResult<&str> {
    std::str::from_utf8(bytes).map_err(|_| PyValueError::new_err("a text has bytes that are not UTF-8"))
}

/// An error of a training: the library's, or an exception that a callback raised.
struct TrainingError(PyErr);

impl From<rustbpe::Error> for TrainingError {
    fn from(error: rustbpe::Error) -> Self {
        Self(value_error(error))
    }
}

impl From<PyErr> for TrainingError {
    fn from(error: PyErr) -> Self {
        Self(error)
    }
}

/// A training in progress: texts are counted on other threads, then the merges are found.
struct Training<'py> {
    py: Python<'py>,
    vocab_size: u32,
    splitter: Splitter,
    counter: WordCounter,
    texts: Texts,
    bytes: usize,
    progress: Option<Py<PyAny>>,
    max_chars: usize,
}

impl<'py> Training<'py> {
    fn new(
        py: Python<'py>,
        vocab_size: i64,
        pattern: Option<&str>,
        progress: Option<Py<PyAny>>,
        max_chars: Option<usize>,
    ) -> PyResult<Self> {
        let Ok(vocab_size @ 256..) = u32::try_from(vocab_size) else {
            return Err(value_error(format!("vocab_size={vocab_size} is not between 256 and {}", u32::MAX)));
        };
        let splitter = splitter(pattern)?;
        let counter = WordCounter::new(&splitter);
        let max_chars = max_chars.unwrap_or(usize::MAX);
        Ok(Self { py, vocab_size, splitter, counter, texts: Texts::default(), bytes: 0, progress, max_chars })
    }

    /// Adds the first `max_chars` characters of a text.
    fn add(&mut self, text: &str) -> PyResult<()> {
        let cut = if text.len() > self.max_chars { text.char_indices().nth(self.max_chars) } else { None };
        let text = cut.map_or(text, |(end, _)| &text[..end]);
        self.texts.push(text);
        self.bytes += text.len();
        if self.texts.is_full() {
            let (counter, texts) = (&mut self.counter, std::mem::take(&mut self.texts));
            self.py.detach(|| counter.add(texts)).map_err(value_error)?;
            report(self.py, &self.progress, ("counting", self.bytes, None))?;
        }
        Ok(())
    }

    /// The tokenizer of all texts.
    fn finish(self) -> PyResult<rustbpe::Tokenizer> {
        let Self { py, vocab_size, splitter, mut counter, texts, progress, .. } = self;
        let tokenizer = py.detach(|| -> Result<_, TrainingError> {
            counter.add(texts)?;
            let words = counter.finish()?;
            let total = Some(vocab_size as usize - 256);
            let tick = |done| Python::attach(|py| Ok(report(py, &progress, ("merging", done, total))?));
            let merges = train::<TrainingError>(words, vocab_size, tick)?;
            Ok(rustbpe::Tokenizer::new(splitter, merges))
        });
        tokenizer.map_err(|TrainingError(error)| error)
    }
}

/// Raises KeyboardInterrupt on Ctrl-C, then calls `progress` with (phase, done, total).
fn report(py: Python<'_>, progress: &Option<Py<PyAny>>, arguments: (&str, usize, Option<usize>)) -> PyResult<()> {
    py.check_signals()?;
    progress.as_ref().map_or(Ok(()), |f| f.call1(py, arguments).map(drop))
}
