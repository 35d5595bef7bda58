//! The Python module: converts, frees the interpreter for all heavy work, and maps errors.

use std::sync::Arc;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::{PyBackedBytes, PyBackedStr};
use pyo3::types::{PyBytes, PyString};

use crate::decoder::{Cache, Layer, Place, Rotary, Token};
use crate::matmul::{Matrix, Weights};
use crate::sampler::Sampler;
use crate::{Error, GPT4_PATTERN, Splitter, Texts, WordCounter, train};

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

    /// A tokenizer that encodes with `tokens`, the bytes of every token in the order of the ids (see
    /// get_mergeable_ranks). Raises ValueError when they are not the 256 bytes and then what merges make of them.
    #[staticmethod]
    #[pyo3(signature = (tokens, pattern=None))]
    fn from_tokens(tokens: Vec<PyBackedBytes>, pattern: Option<&str>) -> PyResult<Self> {
        let splitter = Splitter::new(pattern.unwrap_or(GPT4_PATTERN))?;
        Ok(Self(crate::Tokenizer::from_tokens(splitter, &tokens)?))
    }

    /// Learn at most `vocab_size - 256` merges from an iterable of str.
    ///
    /// Texts are counted on all cores while more are read; other Python threads can run meanwhile. `buffer_size` is
    /// for compatibility only. `pattern` is the regular expression that cuts text into pieces (default: GPT-4's with
    /// digits in groups of 1-2). `progress(phase, done, total)`, if given, is called now and then: phase is "counting"
    /// (done in bytes, total None) or "merging" (done and total in merges). Of each text, only the first `max_chars`
    /// characters are read. Raises ValueError for a bad pattern or size, TypeError for items that are not str, UnicodeEncodeError for lone surrogates, and whatever the iterator
    /// raises; the tokenizer is then as it was before.
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
                // to_str would leave a copy with the str for as long as it lives: all texts twice
                training.add(utf8(text.encode_utf8()?.as_bytes())?)?;
            }
        }
        self.0 = training.finish()?;
        Ok(())
    }

    /// The same from pyarrow: an iterable of string Arrays or ChunkedArrays, or of RecordBatches or Tables, of which
    /// `column` is taken. No Python string is made. Nulls count as empty.
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
            let batch = batch?;
            let array = if batch.hasattr("schema")? { batch.call_method1("column", (column,))? } else { batch };
            if array.hasattr("chunks")? {
                for chunk in array.getattr("chunks")?.try_iter()? {
                    add_array(&mut training, chunk?)?;
                }
            } else {
                add_array(&mut training, array)?;
            }
        }
        self.0 = training.finish()?;
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

    /// The token ids of `text`; names of special tokens in it are text like any other.
    fn encode(&self, py: Python<'_>, text: &str) -> PyResult<Vec<u32>> {
        Ok(py.detach(|| self.0.encode(text))?)
    }

    /// The token ids of every text, on `num_threads` threads (default: all cores).
    #[pyo3(signature = (texts, num_threads=None))]
    fn encode_batch(
        &self,
        py: Python<'_>,
        texts: Vec<PyBackedStr>,
        num_threads: Option<usize>,
    ) -> PyResult<Vec<Vec<u32>>> {
        py.detach(|| match num_threads {
            None => Ok(self.0.encode_batch(&texts)?),
            Some(n) => {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build();
                let pool = pool.map_err(|e| PyValueError::new_err(format!("num_threads={n}: {e}")))?;
                Ok(pool.install(|| self.0.encode_batch(&texts))?)
            }
        })
    }
}

/// A training that is under way: texts go to the threads that count them, then the merges are found.
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
            return Err(PyValueError::new_err(format!("vocab_size={vocab_size} is not between 256 and {}", u32::MAX)));
        };
        let splitter = Splitter::new(pattern.unwrap_or(GPT4_PATTERN))?;
        let counter = WordCounter::new(&splitter);
        let max_chars = max_chars.unwrap_or(usize::MAX);
        Ok(Self { py, vocab_size, splitter, counter, texts: Texts::default(), bytes: 0, progress, max_chars })
    }

    fn add(&mut self, text: &str) -> PyResult<()> {
        let cut = if text.len() > self.max_chars { text.char_indices().nth(self.max_chars) } else { None };
        let text = cut.map_or(text, |(end, _)| &text[..end]);
        self.texts.push(text);
        self.bytes += text.len();
        if self.texts.is_full() {
            let (counter, texts) = (&mut self.counter, std::mem::take(&mut self.texts));
            self.py.detach(|| counter.add(texts))?;
            tell(self.py, &self.progress, ("counting", self.bytes, None))?;
        }
        Ok(())
    }

    fn finish(self) -> PyResult<crate::Tokenizer> {
        let Self { py, vocab_size, splitter, mut counter, texts, progress, .. } = self;
        py.detach(|| {
            counter.add(texts)?;
            let words = counter.finish()?;
            let tick =
                |done| Python::attach(|py| tell(py, &progress, ("merging", done, Some(vocab_size as usize - 256))));
            Ok(crate::Tokenizer::new(splitter, train(words, vocab_size, tick)?))
        })
    }
}

/// Lets Ctrl-C through, and calls `progress`.
fn tell(py: Python<'_>, progress: &Option<Py<PyAny>>, news: (&str, usize, Option<usize>)) -> PyResult<()> {
    py.check_signals()?;
    progress.as_ref().map_or(Ok(()), |f| f.call1(py, news).map(drop))
}

fn utf8(bytes: &[u8]) -> PyResult<&str> {
    std::str::from_utf8(bytes).map_err(|_| PyValueError::new_err("a text has bytes that are not UTF-8"))
}

/// Adds the texts of a pyarrow.Array, a window of its bytes at a time.
fn add_array(training: &mut Training<'_>, array: Bound<'_, PyAny>) -> PyResult<()> {
    const WINDOW: usize = 1 << 20;
    let of_type = array.getattr("type")?.str()?.to_string();
    let (array, width) = match &of_type[..] {
        "string" => (array, 4),
        "large_string" => (array, 8),
        other if other.starts_with("dictionary<values=string") || other.starts_with("string_view") => {
            (array.call_method1("cast", ("large_string",))?, 8)
        }
        other => return Err(PyTypeError::new_err(format!("the column has type {other}, not string"))),
    };
    let array =
        if array.getattr("null_count")?.extract::<usize>()? > 0 { array.call_method0("drop_null")? } else { array };
    let (first, n): (usize, usize) = (array.getattr("offset")?.extract()?, array.len()?);
    if n == 0 {
        return Ok(());
    }
    let buffers: Vec<Option<Bound<PyAny>>> = array.call_method0("buffers")?.extract()?;
    let [_, Some(offsets), Some(data)] = &buffers[..] else { return Ok(()) }; // all texts are empty
    let copy = |buffer: &Bound<PyAny>, start: usize, len: usize| -> PyResult<PyBackedBytes> {
        buffer.call_method1("slice", (start, len))?.call_method0("to_pybytes")?.extract().map_err(PyErr::from)
    };
    let wide = |bytes: &[u8]| bytes.iter().rev().fold(0, |number, &byte| number << 8 | usize::from(byte));
    let offsets: Vec<usize> = copy(offsets, first * width, (n + 1) * width)?.chunks_exact(width).map(wide).collect();
    let bad = |what| PyValueError::new_err(format!("the column has {what}"));
    if !offsets.is_sorted() {
        return Err(bad("offsets that go back"));
    }
    let mut first = 0;
    while first < n {
        let start = offsets[first];
        let last = offsets.partition_point(|&end| end <= start + WINDOW).clamp(first + 2, n + 1); // one text at least
        let window = copy(data, start, offsets[last - 1] - start)?;
        for text in offsets[first..last].windows(2) {
            let text = window.get(text[0] - start..text[1] - start).ok_or_else(|| bad("offsets beyond its end"))?;
            training.add(utf8(text)?)?;
        }
        first = last - 1;
    }
    Ok(())
}

/// The model's forward pass over a few tokens on a CPU, with weights that lie in torch's tensors.
///
/// Matrices are (dtype, address, rows, columns, address of the rows' scales or 0), dtype one of "float32", "bfloat16"
/// and "int8". The caller keeps the memory.
#[pyclass(module = "rustbpe", frozen)]
struct Decoder(Arc<crate::decoder::Decoder>);

type Tensor = (String, usize, usize, usize, usize);

fn matrix((dtype, data, n_out, n_in, scales): Tensor) -> PyResult<Matrix> {
    let weights = match &dtype[..] {
        "float32" => Weights::F32(data as _),
        "bfloat16" => Weights::Bf16(data as _),
        "int8" => Weights::I8(data as _, scales as _),
        other => return Err(PyValueError::new_err(format!("no weights of type {other}"))),
    };
    Ok(Matrix { weights, n_out, n_in })
}

#[pymethods]
#[allow(unsafe_code)]
impl Decoder {
    /// `heads` are (n_head, n_kv_head, head_dim).
    #[new]
    fn new(
        embedding: Tensor,
        layers: Vec<[Tensor; 4]>,
        head: Tensor,
        heads: (usize, usize, usize),
        eps: f32,
        softcap: f32,
    ) -> PyResult<Self> {
        let layer = |[qkv, proj, up, down]: [Tensor; 4]| {
            Ok(Layer { qkv: matrix(qkv)?, proj: matrix(proj)?, up: matrix(up)?, down: matrix(down)? })
        };
        let (n_head, n_kv_head, head_dim) = heads;
        Ok(Self(Arc::new(crate::decoder::Decoder {
            embedding: matrix(embedding)?,
            layers: layers.into_iter().map(layer).collect::<PyResult<_>>()?,
            head: matrix(head)?,
            n_head,
            n_kv_head,
            head_dim,
            eps,
            softcap,
        })))
    }

    /// Let `tokens`, a list for each row, join a cache (layers, 2, rows, n_kv_head, columns, head_dim), given as (dtype,
    /// address, rows, columns), behind the `lengths` that its rows have; `rotary` are the addresses of cosines and
    /// sines. With an address of `logits`, the logits after every token are written there. Raises ValueError for ids
    /// that the embedding lacks, and for a cache without room or of another type than float32 and bfloat16.
    #[allow(clippy::too_many_arguments)]
    fn forward(
        &self,
        py: Python<'_>,
        tokens: Vec<Vec<usize>>,
        lengths: Vec<usize>,
        cache: (String, usize, usize, usize),
        rotary: (usize, usize),
        logits: Option<usize>,
        threads: usize,
    ) -> PyResult<()> {
        let (dtype, data, rows, columns) = cache;
        let wide = dtype == "float32";
        if !wide && dtype != "bfloat16" {
            return Err(PyValueError::new_err(format!("no cache of type {dtype}")));
        }
        let mut found = Vec::new();
        for (row, (ids, length)) in tokens.iter().zip(lengths).enumerate() {
            found.extend(ids.iter().zip(length..).map(|(&id, position)| Token { id, row, position }));
        }
        if let Some(Token { id, .. }) = found.iter().find(|token| token.id >= self.0.embedding.n_out) {
            return Err(PyValueError::new_err(format!("there is no token {id}")));
        }
        if found.iter().any(|token| token.row >= rows || token.position >= columns) {
            return Err(PyValueError::new_err(format!("the cache of {rows} rows and {columns} columns is too small")));
        }
        py.detach(|| {
            let data = if wide { Place::F32(data as _) } else { Place::Bf16(data as _) };
            let cache = Cache { data, rows, columns };
            let rotary = Rotary { cos: rotary.0 as _, sin: rotary.1 as _ };
            unsafe { self.0.forward(found, cache, rotary, logits.map(|address| address as _), threads) }
        });
        Ok(())
    }
}

/// A token for each number in `uniforms` (from 0 to 1), from float32 logits (len(uniforms), vocab_size) at an address.
///
/// `temperature` 0 takes the likeliest; `top_k` 0, `top_p` 1 and `min_p` 0 are off.
#[pyfunction]
#[allow(unsafe_code)]
fn sample(
    logits: usize,
    vocab_size: usize,
    uniforms: Vec<f32>,
    temperature: f32,
    top_k: usize,
    top_p: f32,
    min_p: f32,
) -> Vec<usize> {
    let sampler = Sampler { temperature, top_k, top_p, min_p };
    let logits = unsafe { std::slice::from_raw_parts(logits as *const f32, uniforms.len() * vocab_size) };
    logits.chunks(vocab_size).zip(uniforms).map(|(row, uniform)| sampler.draw(row, uniform)).collect()
}

/// Byte-level BPE training and encoding, and decoding with a model, in Rust.
#[pymodule]
mod rustbpe {
    #[pymodule_export]
    use super::{Decoder, Tokenizer, sample};
}
