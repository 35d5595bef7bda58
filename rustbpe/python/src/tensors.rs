//! Torch tensors as slices: the one place that checks what Python passes and reads addresses from it.

use std::sync::{Mutex, PoisonError};

use nanochat_kernels::{Bf16, CacheData, Element, KvCache, Matrix, Weights};
use pyo3::exceptions::PyTypeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyTuple, PyWeakrefMethods, PyWeakrefReference};

use crate::value_error;

/// Element types that the kernels know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DType {
    Float32,
    BFloat16,
    Int8,
}

impl DType {
    const ALL: [Self; 3] = [Self::Float32, Self::BFloat16, Self::Int8];

    fn name(self) -> &'static str {
        match self {
            Self::Float32 => "float32",
            Self::BFloat16 => "bfloat16",
            Self::Int8 => "int8",
        }
    }

    /// Bytes of an element, which is also its alignment.
    fn size(self) -> usize {
        match self {
            Self::Float32 => 4,
            Self::BFloat16 => 2,
            Self::Int8 => 1,
        }
    }
}

/// An element type of the kernels and its torch dtype.
pub(crate) trait TensorElement: Element {
    const DTYPE: DType;
}

impl TensorElement for f32 {
    const DTYPE: DType = DType::Float32;
}

impl TensorElement for Bf16 {
    const DTYPE: DType = DType::BFloat16;
}

impl TensorElement for i8 {
    const DTYPE: DType = DType::Int8;
}

/// `torch.Tensor` and the dtypes in the order of [`DType::ALL`].
struct Torch {
    tensor: Py<PyAny>,
    dtypes: [Py<PyAny>; 3],
}

impl Torch {
    fn get(py: Python<'_>) -> PyResult<&'static Self> {
        static TORCH: PyOnceLock<Torch> = PyOnceLock::new();
        TORCH.get_or_try_init(py, || {
            let torch = py.import("torch")?;
            let dtype = |dtype: DType| PyResult::Ok(torch.getattr(dtype.name())?.unbind());
            let [f32, bf16, i8] = DType::ALL.map(dtype);
            Ok(Self { tensor: torch.getattr("Tensor")?.unbind(), dtypes: [f32?, bf16?, i8?] })
        })
    }
}

/// What a tensor was when it was read: contiguous, aligned, on the CPU, and of this type and shape.
#[derive(Debug, Clone)]
pub(crate) struct Tensor {
    name: &'static str,
    address: usize,
    dtype: DType,
    pub(crate) shape: Vec<usize>,
}

impl Tensor {
    /// Reads a tensor that errors call `name`. `dtypes` are the types that are allowed.
    ///
    /// Raises TypeError for other objects, ValueError for tensors on other devices, with gaps or of other types.
    pub(crate) fn read(name: &'static str, tensor: &Bound<'_, PyAny>, dtypes: &[DType]) -> PyResult<Self> {
        let py = tensor.py();
        let torch = Torch::get(py)?;
        if !tensor.is_instance(torch.tensor.bind(py))? {
            return Err(PyTypeError::new_err(format!("{name}: expected a torch.Tensor, not {}", tensor.get_type())));
        }
        let given = tensor.getattr(intern!(py, "dtype"))?;
        let position = torch.dtypes.iter().position(|known| known.is(&given)).map(|i| DType::ALL[i]);
        let Some(dtype) = position.filter(|dtype| dtypes.contains(dtype)) else {
            let expected = dtypes.iter().map(|dtype| dtype.name()).collect::<Vec<_>>().join(" or ");
            return Err(value_error(format!("{name}: dtype {given} given, {expected} expected")));
        };
        if !tensor.getattr(intern!(py, "is_cpu"))?.is_truthy()? {
            let device = tensor.getattr(intern!(py, "device"))?;
            return Err(value_error(format!("{name}: a tensor on {device} given, one on the CPU expected")));
        }
        if !tensor.call_method0(intern!(py, "is_contiguous"))?.is_truthy()? {
            let strides = tensor.call_method0(intern!(py, "stride"))?;
            return Err(value_error(format!("{name}: strides {strides} given, a contiguous tensor expected")));
        }
        let shape: Vec<usize> = tensor.getattr(intern!(py, "shape"))?.extract()?;
        let address = address(tensor)?;
        if !address.is_multiple_of(dtype.size()) {
            return Err(value_error(format!("{name}: the tensor's memory is not aligned to its elements")));
        }
        Ok(Self { name, address, dtype, shape })
    }

    fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// The shape, if it has `N` dimensions.
    pub(crate) fn dimensions<const N: usize>(&self, expected: &str) -> PyResult<[usize; N]> {
        self.shape[..].try_into().map_err(|_| self.wrong_shape(expected))
    }

    /// A ValueError that shows the shape and the expected one.
    pub(crate) fn wrong_shape(&self, expected: &str) -> PyErr {
        value_error(format!("{}: shape {:?} given, {expected} expected", self.name, self.shape))
    }

    /// Whether the memory of two tensors overlaps.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        let end = |tensor: &Self| tensor.address + tensor.len() * tensor.dtype.size();
        self.address < end(other) && other.address < end(self)
    }

    fn check_dtype(&self, dtype: DType) -> PyResult<()> {
        if self.dtype == dtype {
            return Ok(());
        }
        Err(value_error(format!("{}: {} given, {} expected", self.name, self.dtype.name(), dtype.name())))
    }

    /// The elements.
    ///
    /// # Safety
    /// During `'a` the storage that was read must exist, and nobody may write it.
    pub(crate) unsafe fn slice<'a, T: TensorElement>(&self) -> PyResult<&'a [T]> {
        self.check_dtype(T::DTYPE)?;
        if self.len() == 0 {
            return Ok(&[]);
        }
        // SAFETY: `read` checked that the storage is contiguous and aligned, and `check_dtype` that it is of T. Torch
        // guarantees a valid address and length, the caller the lifetime.
        Ok(unsafe { std::slice::from_raw_parts(self.address as *const T, self.len()) })
    }

    /// The elements, to be written.
    ///
    /// # Safety
    /// During `'a` the storage that was read must exist, and nobody else may access it.
    pub(crate) unsafe fn slice_mut<'a, T: TensorElement>(&self) -> PyResult<&'a mut [T]> {
        self.check_dtype(T::DTYPE)?;
        if self.len() == 0 {
            return Ok(&mut []);
        }
        // SAFETY: as in `slice`; the caller guarantees exclusive access.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.address as *mut T, self.len()) })
    }

    /// A KV cache in the tensor.
    ///
    /// # Safety
    /// As for [`slice_mut`](Self::slice_mut).
    pub(crate) unsafe fn kv_cache<'a>(&self) -> PyResult<KvCache<'a>> {
        let shape = self.dimensions::<6>("(n_layer, 2, rows, n_kv_head, columns, head_dim)")?;
        // SAFETY: as the caller guarantees.
        let data = unsafe {
            match self.dtype {
                DType::Float32 => CacheData::F32(self.slice_mut()?),
                _ => CacheData::Bf16(self.slice_mut()?),
            }
        };
        KvCache::new(data, shape).map_err(value_error)
    }
}

fn address(tensor: &Bound<'_, PyAny>) -> PyResult<usize> {
    tensor.call_method0(intern!(tensor.py(), "data_ptr"))?.extract()
}

/// Weight tensors, kept alive as long as the matrices that point into them.
#[derive(Default)]
pub(crate) struct WeightTensors(Vec<Py<PyAny>>);

impl WeightTensors {
    /// The matrix in `weights`: a tensor (n_out, n_in) of float32 or bfloat16, or a pair of int8 weights and float32
    /// scales (n_out) or (n_out, 1).
    ///
    /// # Safety
    /// The matrix must not be used after `self` is dropped, nor while somebody writes the tensors or resizes them.
    pub(crate) unsafe fn matrix(
        &mut self,
        name: &'static str,
        weights: &Bound<'_, PyAny>,
    ) -> PyResult<Matrix<'static>> {
        let pair = weights.cast::<PyTuple>().ok();
        let (weights, dtypes) = match pair {
            Some(pair) if pair.len() == 2 => (pair.get_item(0)?, &[DType::Int8][..]),
            Some(pair) => {
                return Err(value_error(format!("{name}: {} items given, (int8, scales) expected", pair.len())));
            }
            None => (weights.clone(), &[DType::Float32, DType::BFloat16][..]),
        };
        let tensor = self.hold(name, &weights, dtypes)?;
        let [n_out, n_in] = tensor.dimensions("(n_out, n_in)")?;
        // SAFETY: `self` holds the storages; the rest is as the caller guarantees.
        let weights = unsafe {
            match pair {
                Some(pair) => {
                    let scales = self.hold(name, &pair.get_item(1)?, &[DType::Float32])?;
                    if scales.shape != [n_out] && scales.shape != [n_out, 1] {
                        return Err(scales.wrong_shape(&format!("scales ({n_out}) or ({n_out}, 1)")));
                    }
                    Weights::Int8(tensor.slice()?, scales.slice()?)
                }
                None if tensor.dtype == DType::Float32 => Weights::F32(tensor.slice()?),
                None => Weights::Bf16(tensor.slice()?),
            }
        };
        Matrix::new(weights, n_out, n_in).map_err(|error| value_error(format!("{name}: {error}")))
    }

    /// Reads a tensor and keeps its storage alive.
    fn hold(&mut self, name: &'static str, tensor: &Bound<'_, PyAny>, dtypes: &[DType]) -> PyResult<Tensor> {
        let read = Tensor::read(name, tensor, dtypes)?;
        // A tensor of its own: assigning to `.data`, as `Module.to` does, frees the storage of the original.
        let alias = tensor.call_method0(intern!(tensor.py(), "detach"))?;
        self.0.push(alias.unbind());
        Ok(read)
    }
}

/// Reads a tensor that is mostly the same object as in the last call; then only its address and size are read again.
///
/// The address and the size suffice for memory safety, since both element types of the cache are valid for any bits.
pub(crate) struct LastTensor {
    name: &'static str,
    dtypes: &'static [DType],
    /// Weak, so that an outgrown cache can be freed.
    last: Mutex<Option<(Py<PyWeakrefReference>, Tensor)>>,
}

impl LastTensor {
    pub(crate) fn new(name: &'static str, dtypes: &'static [DType]) -> Self {
        Self { name, dtypes, last: Mutex::default() }
    }

    /// As [`Tensor::read`].
    pub(crate) fn read(&self, tensor: &Bound<'_, PyAny>) -> PyResult<Tensor> {
        let py = tensor.py();
        let lock = || self.last.lock().unwrap_or_else(PoisonError::into_inner);
        // Taken out, so that no lock is held while Python code runs, which may switch threads.
        let last = lock().take();
        let last = match last {
            Some((weak, last)) if weak.bind(py).upgrade().is_some_and(|known| known.is(tensor)) => {
                let size: usize = tensor.getattr(intern!(py, "nbytes"))?.extract()?;
                let same = address(tensor)? == last.address && size == last.len() * last.dtype.size();
                same.then_some((weak, last))
            }
            _ => None,
        };
        let last = match last {
            Some(last) => last,
            None => {
                let read = Tensor::read(self.name, tensor, self.dtypes)?;
                (PyWeakrefReference::new(tensor)?.unbind(), read)
            }
        };
        let read = last.1.clone();
        *lock() = Some(last);
        Ok(read)
    }
}
