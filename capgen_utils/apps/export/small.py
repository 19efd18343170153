"""Write a bundle with 8 bits per weight."""

from pathlib import Path

import torch

from capgen_utils.bundle import load_bundle, save_bundle
from capgen_utils.common.tensors import round_to_bytes

# --- for maintainers


def write_small(folder: Path, output: Path) -> None:
    """Write a bundle with 8 bits for each weight of its matrices: about half of its size.

    An encoder or a CLIP of its own is rounded too.

    Args:
        folder: a bundle.
        output: replaced when it exists.

    Raises:
        CapGenError: the bundle is damaged, or ``output`` cannot be written.
    """
    bundle = load_bundle(folder)
    encoder, scorer = bundle.build_encoder(), bundle.build_scorer()
    if scorer is not None and scorer.images.weights_hash() == encoder.weights_hash():
        encoder = scorer.images
    if scorer is not None and scorer.source is None:
        round_to_bytes(scorer.clip)
    for own in (encoder, encoder.stem):
        if own is not None and not own.public:
            round_to_bytes(own.trunk)
    round_to_bytes(bundle.model)
    bundle.info["encoder"] = encoder.describe()
    save_bundle(output, bundle, encoder, torch.float32, scorer)
