"""The dtypes that weights and indices are stored in: safetensors' names for them, and torch's."""

SAFETENSORS_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
DTYPE_NAMES = tuple(SAFETENSORS_NAMES.values())
INDEX_NAMES = {"I32": "int32"}
