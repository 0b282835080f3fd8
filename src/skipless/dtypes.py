"""The dtypes that weights are stored and folded in: safetensors' names for them, and torch's."""

SAFETENSORS_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
DTYPE_NAMES = tuple(SAFETENSORS_NAMES.values())
