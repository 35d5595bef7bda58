//! A model's weights and shape, checked once, and the entry to its forward pass.

use crate::forward::{ForwardPass, RotaryTables, Token};
use crate::{Error, Isa, KvCache, Matrix};

/// The numbers of a model that its weights do not show.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Config {
    /// Query heads.
    pub n_head: usize,
    /// Key and value heads; divides `n_head`.
    pub n_kv_head: usize,
    /// Values per head; even.
    pub head_dim: usize,
    /// Added to the mean square in RMS norms.
    pub eps: f32,
    /// Logits are `softcap * tanh(x / softcap)`.
    pub softcap: f32,
}

/// The weights of a layer.
#[derive(Debug, Clone, Copy)]
pub struct Layer<'a> {
    /// Query, key and value projections.
    pub qkv: [Matrix<'a>; 3],
    /// Output projection of the attention.
    pub attn_proj: Matrix<'a>,
    /// First matrix of the MLP.
    pub fc: Matrix<'a>,
    /// Second matrix of the MLP.
    pub mlp_proj: Matrix<'a>,
}

impl Layer<'_> {
    fn n_weights(&self) -> usize {
        let matrices = self.qkv.iter().chain([&self.attn_proj, &self.fc, &self.mlp_proj]);
        matrices.map(|matrix| matrix.n_out() * matrix.n_in()).sum()
    }
}

/// A model that decodes: nanochat's Transformer.
#[derive(Debug, Clone)]
pub struct Decoder<'a> {
    pub(crate) embedding: Matrix<'a>,
    pub(crate) layers: Vec<Layer<'a>>,
    pub(crate) head: Matrix<'a>,
    pub(crate) config: Config,
    /// Weights that a token is multiplied with, without the head.
    pub(crate) n_weights: usize,
    /// Values between the two matrices of the MLP.
    pub(crate) n_hidden: usize,
    isa: Isa,
}

impl<'a> Decoder<'a> {
    /// A decoder from an embedding (vocab_size, n_embd), layers, and a head (vocab_size, n_embd).
    ///
    /// # Errors
    /// [`Error::Config`] for numbers that no model has, [`Error::Shape`] for matrices that do not fit together.
    pub fn new(embedding: Matrix<'a>, layers: Vec<Layer<'a>>, head: Matrix<'a>, config: Config) -> Result<Self, Error> {
        let Config { n_head, n_kv_head, head_dim, .. } = config;
        let check = |valid, name, given, expected| {
            if valid { Ok(()) } else { Err(Error::Config { name, given, expected }) }
        };
        check(n_kv_head > 0 && n_head.is_multiple_of(n_kv_head), "n_kv_head", n_kv_head, "a divisor of n_head")?;
        check(n_head > 0, "n_head", n_head, "1 or more")?;
        check(head_dim > 0 && head_dim.is_multiple_of(2), "head_dim", head_dim, "an even number from 2 on")?;
        check(!layers.is_empty(), "n_layer", layers.len(), "1 or more")?;
        let (n_embd, n_hidden) = (embedding.n_in(), layers[0].fc.n_out());
        check(n_embd > 0, "n_embd", n_embd, "1 or more")?;
        let (width, kv_width) = (n_head * head_dim, n_kv_head * head_dim);
        for (i, layer) in layers.iter().enumerate() {
            let [q, k, v] = layer.qkv;
            for (name, matrix, n_out, n_in) in [
                ("q", q, width, n_embd),
                ("k", k, kv_width, n_embd),
                ("v", v, kv_width, n_embd),
                ("attn_proj", layer.attn_proj, n_embd, width),
                ("fc", layer.fc, n_hidden, n_embd),
                ("mlp_proj", layer.mlp_proj, n_embd, n_hidden),
            ] {
                check_shape(|| format!("layer {i}, {name}"), matrix, n_out, n_in)?;
            }
        }
        check_shape(|| "head".into(), head, head.n_out(), n_embd)?;
        let n_weights = layers.iter().map(Layer::n_weights).sum();
        Ok(Self { embedding, layers, head, config, n_weights, n_hidden, isa: Isa::detect() })
    }

    /// The same decoder on another instruction set than the CPU's fastest.
    ///
    /// # Errors
    /// [`Error::Isa`] if the CPU has no `isa`.
    pub fn with_isa(self, isa: Isa) -> Result<Self, Error> {
        Ok(Self { isa: isa.check()?, ..self })
    }

    /// The numbers that the decoder was made with.
    pub fn config(&self) -> Config {
        self.config
    }

    /// The number of token ids that have logits.
    pub fn vocab_size(&self) -> usize {
        self.head.n_out()
    }

    /// Appends tokens to the rows of a KV cache, and computes the logits after each.
    ///
    /// `tokens[i]` are appended to row `i`, which holds `lengths[i]` tokens. `logits` is (sum of tokens, vocab_size);
    /// without it only the cache is updated, and what the cache does not need is skipped. Runs on up to `threads`
    /// threads of the current rayon pool, including the caller's. Logits are the same to the bit for any other rows,
    /// split of the tokens into calls, and number of threads.
    ///
    /// # Errors
    /// Before anything is written: [`Error::Token`] for ids without an embedding, [`Error::CacheFull`],
    /// [`Error::Shape`] for the cache of another model, [`Error::Length`] for `lengths`, `logits` and rotary tables.
    pub fn forward(
        &self,
        tokens: &[Vec<usize>],
        lengths: &[usize],
        cache: &mut KvCache<'_>,
        rotary: RotaryTables<'_>,
        logits: Option<&mut [f32]>,
        threads: usize,
    ) -> Result<(), Error> {
        Error::check_length("lengths", lengths.len(), Some(tokens.len()))?;
        let Config { n_kv_head, head_dim, .. } = self.config;
        let [_, _, cache_rows, _, cache_columns, _] = cache.shape();
        let expected = [self.layers.len(), 2, cache_rows, n_kv_head, cache_columns, head_dim];
        if cache.shape() != expected {
            return Err(Error::Shape { name: "cache".into(), given: cache.shape().into(), expected: expected.into() });
        }
        let ends = tokens.iter().zip(lengths).map(|(ids, length)| length.saturating_add(ids.len()));
        let (rows, columns) = (tokens.len(), ends.max().unwrap_or(0));
        if rows > cache_rows || columns > cache_columns {
            return Err(Error::CacheFull { rows, columns, cache_rows, cache_columns });
        }
        rotary.check(columns, head_dim)?;
        let mut flat = Vec::with_capacity(tokens.iter().map(Vec::len).sum());
        for (row, (ids, &length)) in tokens.iter().zip(lengths).enumerate() {
            flat.extend(ids.iter().zip(length..).map(|(&id, position)| Token { id, row, position }));
        }
        let vocab_size = self.embedding.n_out();
        if let Some(&Token { id, .. }) = flat.iter().find(|token| token.id >= vocab_size) {
            return Err(Error::Token { id, vocab_size });
        }
        if let Some(logits) = &logits {
            Error::check_length("logits", logits.len(), flat.len().checked_mul(self.vocab_size()))?;
        }
        if flat.is_empty() {
            return Ok(());
        }
        ForwardPass::run(self, &flat, cache.pointer(), rotary, logits, threads, self.isa);
        Ok(())
    }
}

fn check_shape(name: impl Fn() -> String, matrix: Matrix<'_>, n_out: usize, n_in: usize) -> Result<(), Error> {
    let (given, expected) = ([matrix.n_out(), matrix.n_in()], [n_out, n_in]);
    if given == expected {
        return Ok(());
    }
    Err(Error::Shape { name: name(), given: given.into(), expected: expected.into() })
}
