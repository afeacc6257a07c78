"""A quantised GGUF file -> one with plain BF16 matrices, for llama.cpp's server.

Metadata (tokenizer, chat template) are kept; vectors, such as the weights of norms, become
float32, as in llama.cpp's own conversion. Why: a server of llama.cpp computes small quantised
models in 8-bit integers, and a model of 135 million parameters then answers easy questions with
nonsense; in BF16 it answers as transformers does.
"""

from __future__ import annotations

from pathlib import Path

from cowest_dspy.errors import ModelError
from cowest_dspy.lms.local.weights import UNREADABLE_GGUF, check_gguf


def convert(source: Path, target: Path) -> Path:
    """Write the model in ``source`` to the new file ``target``, whole or not at all.

    Raises:
        ModelError: the source is missing, no GGUF or damaged; the target is taken.
    """
    if target.exists():
        raise ModelError(f"{target} exists already. Name a new file, or delete it: rm {target}")
    check_gguf(source)
    staging = target.with_name(f".{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write(source, staging)
        staging.rename(target)
    except UNREADABLE_GGUF as error:
        raise ModelError(
            f"{source} cannot be read: it is damaged or ends too early. Fetch it again. The reader "
            f"said: {error}"
        ) from error
    finally:
        staging.unlink(missing_ok=True)
    return target


def _write(source: Path, target: Path) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
    from gguf.quants import dequantize, quantize

    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        # These the writer writes itself.
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim < 2:
            writer.add_tensor(tensor.name, values)
        else:
            kind = GGMLQuantizationType.BF16
            writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
