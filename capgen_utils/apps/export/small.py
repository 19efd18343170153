"""Write a bundle with 8 bits per weight."""

from pathlib import Path

import torch

from capgen_utils.bundle import load_bundle, save_bundle
from capgen_utils.common.tensors import round_to_bytes


def write_small(folder: Path, output: Path) -> None:
    """Write a bundle with 8 bits for each weight of its matrices, about half its size.

    An encoder or CLIP inside the bundle is rounded too.

    Args:
        folder: a bundle.
        output: replaced if it exists.

    Raises:
        CapGenError: the bundle is damaged, or ``output`` cannot be written.
    """
    bundle = load_bundle(folder)
    encoder, scorer = bundle.build_encoder(), bundle.build_scorer()
    if scorer is not None and scorer.images.weights_hash() == encoder.weights_hash():
        encoder = scorer.images
    if scorer is not None and scorer.source is None:
        round_to_bytes(scorer.clip)
    for each in (encoder, encoder.stem):
        if each is not None and not each.public:
            round_to_bytes(each.trunk)
    round_to_bytes(bundle.model)
    bundle.info["encoder"] = encoder.describe()
    save_bundle(output, bundle, encoder, torch.float32, scorer)
