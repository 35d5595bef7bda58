//! Texts of pyarrow arrays, copied from Arrow's buffers in windows.

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;

use crate::value_error;

/// Bytes that are copied at a time, unless one text is longer.
const WINDOW: usize = 1 << 20;

/// Calls `each` with the bytes of every text of an Array, a ChunkedArray, or column `column` of a RecordBatch or Table.
///
/// Raises TypeError if the texts are not strings, ValueError for invalid offsets.
pub(crate) fn for_each_text(
    batch: Bound<'_, PyAny>,
    column: &str,
    mut each: impl FnMut(&[u8]) -> PyResult<()>,
) -> PyResult<()> {
    let array = if batch.hasattr("schema")? { batch.call_method1("column", (column,))? } else { batch };
    if !array.hasattr("chunks")? {
        return for_each_in_array(array, each);
    }
    for chunk in array.getattr("chunks")?.try_iter()? {
        for_each_in_array(chunk?, &mut each)?;
    }
    Ok(())
}

fn for_each_in_array(array: Bound<'_, PyAny>, mut each: impl FnMut(&[u8]) -> PyResult<()>) -> PyResult<()> {
    let type_name = array.getattr("type")?.str()?.to_string();
    let (array, offset_bytes) = match &type_name[..] {
        "string" => (array, 4),
        "large_string" => (array, 8),
        other if other.starts_with("dictionary<values=string") || other.starts_with("string_view") => {
            (array.call_method1("cast", ("large_string",))?, 8)
        }
        other => return Err(PyTypeError::new_err(format!("the column has type {other}, not string"))),
    };
    let has_nulls = array.getattr("null_count")?.extract::<usize>()? > 0;
    let array = if has_nulls { array.call_method0("drop_null")? } else { array };
    let (first, n): (usize, usize) = (array.getattr("offset")?.extract()?, array.len()?);
    if n == 0 {
        return Ok(());
    }
    let buffers: Vec<Option<Bound<PyAny>>> = array.call_method0("buffers")?.extract()?;
    let [_, Some(offsets), Some(data)] = &buffers[..] else { return Ok(()) }; // all texts are empty
    let copy = |buffer: &Bound<PyAny>, start: usize, len: usize| -> PyResult<PyBackedBytes> {
        buffer.call_method1("slice", (start, len))?.call_method0("to_pybytes")?.extract().map_err(PyErr::from)
    };
    let integer = |bytes: &[u8]| bytes.iter().rev().fold(0, |number, &byte| number << 8 | usize::from(byte));
    let offsets = copy(offsets, first * offset_bytes, (n + 1) * offset_bytes)?;
    let offsets: Vec<usize> = offsets.chunks_exact(offset_bytes).map(integer).collect();
    let invalid = |what| value_error(format!("the column has {what}"));
    if !offsets.is_sorted() {
        return Err(invalid("offsets that go back"));
    }
    let mut first = 0;
    while first < n {
        let start = offsets[first];
        let last = offsets.partition_point(|&end| end <= start + WINDOW).clamp(first + 2, n + 1); // at least one text
        let window = copy(data, start, offsets[last - 1] - start)?;
        for text in offsets[first..last].windows(2) {
            each(window.get(text[0] - start..text[1] - start).ok_or_else(|| invalid("offsets beyond its end"))?)?;
        }
        first = last - 1;
    }
    Ok(())
}
