"""The text column of a parquet file, in whatever type its writer chose."""

from nanochat.common import UserError, require

# pyarrow's names. Polars writes string_view, pandas and `datasets` large_string, a category becomes a dictionary.
TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")


def open_parquet(path, column="text", source=None):
    """The ParquetFile at `path` (or in `source`). Raises UserError if `column` is missing or is not text."""
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(source or path)
    schema = file.schema_arrow
    hint = "name the column of the text with --from_files PATH --text_column"
    require(column in schema.names, f"{path} has no column `{column}`, only {', '.join(schema.names)}; {hint}")
    require(schema.names.count(column) == 1, f"{path} has more than one column `{column}`: rename or drop the others")
    kind = schema.field(column).type
    is_text = str(kind.value_type if pyarrow.types.is_dictionary(kind) else kind) in TEXT_TYPES
    require(is_text, f"{path}: the column `{column}` has the type {kind}, expected text")
    return file


def to_strings(column, path):
    """A pyarrow array of one of TEXT_TYPES as an array of strings. Raises UserError for bytes that are not UTF-8."""
    import pyarrow as pa

    column = column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
    try:
        return column if column.type == pa.string() else column.cast(pa.large_string())
    except pa.ArrowInvalid as e:
        text = next(text for text in column.to_pylist() if text and "\ufffd" in text.decode(errors="replace"))
        raise UserError(f"{path} has text that is not UTF-8: {text[:40]}; decode it before writing parquet") from e
