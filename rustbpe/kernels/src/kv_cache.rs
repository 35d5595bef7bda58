//! The KV cache that the decoder reads and extends.

use crate::Error;
use crate::element::{Bf16, CacheElement};
use crate::memory::SharedSlice;

/// The elements of a KV cache.
#[derive(Debug)]
#[non_exhaustive]
pub enum CacheData<'a> {
    /// float32.
    F32(&'a mut [f32]),
    /// bfloat16.
    Bf16(&'a mut [Bf16]),
}

/// Keys and values of all layers: (n_layer, 2, rows, n_kv_head, columns, head_dim).
#[derive(Debug)]
pub struct KvCache<'a> {
    data: CacheData<'a>,
    shape: [usize; 6],
}

impl<'a> KvCache<'a> {
    /// A cache of shape (n_layer, 2, rows, n_kv_head, columns, head_dim).
    ///
    /// # Errors
    /// [`Error::Length`] if `data` has another number of elements.
    pub fn new(data: CacheData<'a>, shape: [usize; 6]) -> Result<Self, Error> {
        let given = match &data {
            CacheData::F32(data) => data.len(),
            CacheData::Bf16(data) => data.len(),
        };
        let expected = shape.iter().try_fold(1_usize, |product, &n| product.checked_mul(n));
        Error::check_length("cache", given, expected)?;
        Ok(Self { data, shape })
    }

    /// (n_layer, 2, rows, n_kv_head, columns, head_dim).
    pub fn shape(&self) -> [usize; 6] {
        self.shape
    }

    /// The cache as the workers share it.
    pub(crate) fn pointer(&mut self) -> CachePointer {
        let shape = self.shape;
        match &mut self.data {
            CacheData::F32(data) => CachePointer::F32(TypedCache { data: SharedSlice::new(data), shape }),
            CacheData::Bf16(data) => CachePointer::Bf16(TypedCache { data: SharedSlice::new(data), shape }),
        }
    }
}

/// KV-cache pointer, typed by element.
#[derive(Clone, Copy)]
pub(crate) enum CachePointer {
    F32(TypedCache<f32>),
    Bf16(TypedCache<Bf16>),
}

/// A KV cache of `E` that the workers share.
#[derive(Clone, Copy)]
pub(crate) struct TypedCache<E> {
    data: SharedSlice<E>,
    shape: [usize; 6],
}

/// Which half of a layer's cache.
#[derive(Clone, Copy)]
pub(crate) enum Half {
    Keys = 0,
    Values = 1,
}

impl<E: CacheElement> TypedCache<E> {
    /// The keys or values of a row's head: elements from the returned one on, (columns, head_dim).
    #[inline(always)]
    fn first(&self, layer: usize, half: Half, row: usize, head: usize) -> usize {
        let [_, _, rows, n_kv_head, columns, head_dim] = self.shape;
        (((layer * 2 + half as usize) * rows + row) * n_kv_head + head) * columns * head_dim
    }

    /// The first `columns` keys or values of a row's head.
    ///
    /// # Safety
    /// The indices must be within the shape, the cache must outlive `'a`, and nobody may write these columns during it.
    #[inline(always)]
    pub(crate) unsafe fn columns<'a>(
        &self,
        layer: usize,
        half: Half,
        row: usize,
        head: usize,
        columns: usize,
    ) -> &'a [E] {
        // SAFETY: as the caller guarantees.
        unsafe { self.data.read(self.first(layer, half, row, head), columns * self.shape[5]) }
    }

    /// Stores `vector` (head_dim), the key or value of a row's head at `column`.
    ///
    /// # Safety
    /// The indices must be within the shape, the cache must be alive, and nobody else may access this column.
    #[inline(always)]
    pub(crate) unsafe fn store(
        &self,
        layer: usize,
        half: Half,
        row: usize,
        head: usize,
        column: usize,
        vector: &[f32],
    ) {
        let first = self.first(layer, half, row, head) + column * self.shape[5];
        // SAFETY: as the caller guarantees.
        let to = unsafe { self.data.write(first, self.shape[5]) };
        to.iter_mut().zip(vector).for_each(|(to, &x)| *to = E::from_f32(x));
    }
}
