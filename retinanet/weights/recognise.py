"""Which of the known layouts a file has."""

from pathlib import Path

from retinanet.errors import UserError
from retinanet.weights import caffe2, detectron2, native, torchvision
from retinanet.weights.download import file_digest
from retinanet.weights.read import Contents
from retinanet.weights.source import Source

_LAYOUTS = (native, caffe2, detectron2, torchvision)
_WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel and torch.compile
_TORCHVISION_V1 = "eeacb38b"  # first digits of the SHA-256 of torchvision's published RetinaNet v1, whose eps is 0


def recognise(file: Path, contents: Contents) -> Source:
    """Return the contents of `file` under native names; raises `UserError` when the layout is none of the known."""
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in contents.tensors):
            contents.tensors = {name.removeprefix(wrapper): tensor for name, tensor in contents.tensors.items()}
    for layout in _LAYOUTS:
        source = layout.recognise(contents)
        if source is not None:
            if source.background_row and file_digest(file, "sha256").startswith(_TORCHVISION_V1):
                source.eps = 0.0
            return source
    names = list(contents.tensors)
    hint = "; its deep stem (ResNet-C, -D) has no counterpart here" if "conv1.0.weight" in names else ""
    raise UserError(
        f"{file}: {len(names)} tensors with names of no known layout ({', '.join(names[:4])}, ...){hint}. Known are "
        "checkpoints of this project, Caffe2 Detectron, detectron2, ResNets and RetinaNets of torchvision, timm's "
        "ResNets and the MABN authors' ResNet"
    )
