//! The model's forward pass and sampling.

use nanochat_kernels::{Config, Layer, RotaryTables, Sampler};
use pyo3::prelude::*;

use crate::tensors::{DType, LastTensor, Tensor, WeightTensors};
use crate::value_error;

/// The forward pass of a model on a CPU, with the weights in torch tensors.
///
/// A matrix is a tensor (n_out, n_in) of float32 or bfloat16, or a pair of int8 weights and float32 scales (n_out, 1).
/// `layers` has (q, k, v, attn_proj, fc, mlp_proj) for each layer. The tensors' memory is kept and must not be resized.
/// Raises ValueError for tensors that do not fit together.
#[pyclass(module = "rustbpe", frozen)]
pub(crate) struct Decoder {
    decoder: nanochat_kernels::Decoder<'static>,
    _weights: WeightTensors, // `decoder` points into them
    cache: LastTensor,
    cos: LastTensor,
    sin: LastTensor,
}

#[pymethods]
impl Decoder {
    #[new]
    #[allow(clippy::too_many_arguments)] // they have names in Python
    fn new(
        embedding: &Bound<'_, PyAny>,
        layers: Vec<[Bound<'_, PyAny>; 6]>,
        head: &Bound<'_, PyAny>,
        n_head: usize,
        n_kv_head: usize,
        head_dim: usize,
        eps: f32,
        softcap: f32,
    ) -> PyResult<Self> {
        let mut weights = WeightTensors::default();
        // SAFETY: `decoder` and `_weights` are private to the object and dropped together, and nothing borrows from
        // `decoder`. Python code must not write weights during a call, nor resize them, as the class says.
        let mut matrix = |name, tensor: &Bound<'_, PyAny>| unsafe { weights.matrix(name, tensor) };
        let embedding = matrix("embedding", embedding)?;
        let layer = |[q, k, v, attn_proj, fc, mlp_proj]: [Bound<'_, PyAny>; 6]| -> PyResult<Layer<'static>> {
            Ok(Layer {
                qkv: [matrix("q", &q)?, matrix("k", &k)?, matrix("v", &v)?],
                attn_proj: matrix("attn_proj", &attn_proj)?,
                fc: matrix("fc", &fc)?,
                mlp_proj: matrix("mlp_proj", &mlp_proj)?,
            })
        };
        let layers = layers.into_iter().map(layer).collect::<PyResult<_>>()?;
        let head = matrix("head", head)?;
        let config = Config { n_head, n_kv_head, head_dim, eps, softcap };
        let decoder = nanochat_kernels::Decoder::new(embedding, layers, head, config).map_err(value_error)?;
        Ok(Self {
            decoder,
            _weights: weights,
            cache: LastTensor::new("cache", &[DType::Float32, DType::BFloat16]),
            cos: LastTensor::new("cos", &[DType::Float32]),
            sin: LastTensor::new("sin", &[DType::Float32]),
        })
    }

    /// Append `tokens`, a list for each row, to the rows of `cache`, which hold `lengths` tokens.
    ///
    /// `cache` is float32 or bfloat16 (n_layer, 2, rows, n_kv_head, columns, head_dim); `cos` and `sin` are float32
    /// (positions, head_dim / 2). The logits after each token go to `logits`, float32 (sum of tokens, vocab_size), unless
    /// it is None. Raises ValueError for unknown token ids, a full cache, and tensors of wrong shape or type.
    #[allow(clippy::too_many_arguments)]
    fn forward(
        &self,
        py: Python<'_>,
        tokens: Vec<Vec<usize>>,
        lengths: Vec<usize>,
        cache: &Bound<'_, PyAny>,
        cos: &Bound<'_, PyAny>,
        sin: &Bound<'_, PyAny>,
        logits: Option<&Bound<'_, PyAny>>,
        threads: usize,
    ) -> PyResult<()> {
        let (cache, cos, sin) = (self.cache.read(cache)?, self.cos.read(cos)?, self.sin.read(sin)?);
        let logits = logits.map(|logits| Tensor::read("logits", logits, &[DType::Float32])).transpose()?;
        let half = self.decoder.config().head_dim / 2;
        for table in [&cos, &sin] {
            if table.dimensions::<2>("(positions, head_dim / 2)")?[1] != half {
                return Err(table.wrong_shape(&format!("(positions, {half})")));
            }
        }
        if let Some(logits) = &logits {
            let n_tokens = tokens.iter().map(Vec::len).sum();
            if logits.shape != [n_tokens, self.decoder.vocab_size()] {
                return Err(logits.wrong_shape(&format!("({n_tokens}, {})", self.decoder.vocab_size())));
            }
        }
        if [&cos, &sin].iter().chain(&logits.as_ref()).any(|tensor| tensor.overlaps(&cache))
            || logits.as_ref().is_some_and(|logits| cos.overlaps(logits) || sin.overlaps(logits))
        {
            return Err(value_error("cache, cos, sin and logits share memory: separate tensors expected"));
        }
        // SAFETY: the arguments keep the tensors alive during the call, and those that are written share no memory with
        // the others. Python code must not use the cache and the logits in other threads meanwhile.
        let (mut cache, rotary, logits) = unsafe {
            let rotary = RotaryTables { cos: cos.slice()?, sin: sin.slice()? };
            (cache.kv_cache()?, rotary, logits.map(|logits| logits.slice_mut()).transpose()?)
        };
        py.detach(|| self.decoder.forward(&tokens, &lengths, &mut cache, rotary, logits, threads)).map_err(value_error)
    }
}

/// A token id for each number in `uniforms` (from 0 to 1), sampled from float32 logits (len(uniforms), vocab_size).
///
/// `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off. Raises ValueError for other logits.
#[pyfunction]
pub(crate) fn sample(
    logits: &Bound<'_, PyAny>,
    uniforms: Vec<f32>,
    temperature: f32,
    top_k: usize,
    top_p: f32,
    min_p: f32,
) -> PyResult<Vec<usize>> {
    let tensor = Tensor::read("logits", logits, &[DType::Float32])?;
    let [rows, vocab_size] = tensor.dimensions("(rows, vocab_size)")?;
    if rows != uniforms.len() || vocab_size == 0 {
        return Err(tensor.wrong_shape(&format!("({}, vocab_size)", uniforms.len())));
    }
    // SAFETY: the argument keeps the tensor alive, and Python code does not run during the call.
    let logits: &[f32] = unsafe { tensor.slice()? };
    let sampler = Sampler { temperature, top_k, top_p, min_p };
    let rows = logits.chunks_exact(vocab_size).zip(uniforms);
    let tokens: Option<Vec<usize>> = rows.map(|(row, uniform)| sampler.sample(row, uniform)).collect();
    tokens.ok_or_else(|| tensor.wrong_shape("(rows, vocab_size)"))
}
