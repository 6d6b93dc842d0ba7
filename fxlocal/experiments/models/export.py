"""A model as the bytes of a file that other programs read."""

import importlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ...errors import nearest
from .catalogue import ModelError

__all__ = ["FORMATS", "find_format", "pack_model"]

FORMATS = ("safetensors", "onnx", "pt2")
_FACTS = "fxlocal"  # under which a file says what the model is, in JSON


def find_format(path: Path, asked: str) -> str:
    """Return the format of a file: the one that is asked for, or else its suffix.

    Raises:
        ModelError: if that is none of `FORMATS`, or cannot be written here.
    """
    found = asked or path.suffix.removeprefix(".")
    if found not in FORMATS:
        what = f"--format {asked}" if asked else f"{path}: no format has the suffix {found!r}"
        raise ModelError(f"{what}. Nearest: {nearest(found, FORMATS)}; give --format")
    try:
        for name in ("onnx", "onnxscript") if found == "onnx" else ():
            importlib.import_module(name)
    except ImportError as error:
        raise ModelError(f"{path} needs {name}: pip install 'fxlocal[onnx]'") from error
    return found


def pack_model(
    model: nn.Module, example: Tensor, kind: str, facts: Mapping[str, Any]
) -> tuple[bytes, str]:
    """Return a model, in evaluation mode, as the bytes of a file, and what to know of it.

    Args:
        model: is left as it is.
        example: a batch of 2 images.
        kind: one of `FORMATS`: its weights alone, or its graph with them, from "images" to
            "logits".
        facts: are kept in the file, as JSON: safetensors and ONNX have them in their metadata
            under "fxlocal", .pt2 as an extra file of that name.

    Raises:
        ModelError: if torch cannot export it.
    """
    told = json.dumps(facts)
    if kind == "safetensors":
        # A tensor that two names have is written twice, as any reader understands.
        own = {name: t.contiguous().clone() for name, t in model.state_dict().items()}
        return safetensors.torch.save(own, {_FACTS: told, "format": "pt"}), ""
    try:
        shapes = ({0: torch.export.Dim.AUTO},)
        exported = torch.export.export(model.eval(), (example,), dynamic_shapes=shapes)
        (name,) = exported.graph_signature.user_inputs
        images = next(node for node in exported.graph.nodes if node.name == name)
        batch = images.meta["val"].shape[0]  # a symbol for any
        note = f", for batches of {batch} alone" if isinstance(batch, int) else ""
        if kind == "pt2":
            packed = io.BytesIO()
            torch.export.save(exported, packed, extra_files={_FACTS: told})
            return packed.getvalue(), note
        names: Any = {"input_names": ["images"], "output_names": ["logits"]}
        program = torch.onnx.export(exported, dynamo=True, verbose=False, **names)
        assert program is not None  # as dynamo has it
        program.model.metadata_props[_FACTS] = told
        return program.model_proto.SerializeToString(), note
    except Exception as error:  # of many classes, by what in the model they cannot do
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"torch cannot export the model as {kind}: {reason[:200]}") from error
