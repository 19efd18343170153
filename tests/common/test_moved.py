"""Names that notebooks of earlier copies import: they still work, with a warning."""

import importlib

import pytest

# Old module -> the names that the committed notebooks imported from it.
EARLIER = {
    "attention": ["caption_maps", "layer_attention", "next_words", "rollout"],
    "baselines": [
        "beside_people",
        "best_constant",
        "constant_captions",
        "human_row",
        "nearest_captions",
        "random_captions",
    ],
    "batches": ["make_batch"],
    "bpe": ["BpeTokenizer"],
    "checkpoint": ["load_bundle"],
    "compat": ["import_torchvision"],
    "config": ["choose_device", "choose_dtype", "data_dir"],
    "contrastive": [
        "ContrastiveTrainer",
        "Reconstruction",
        "info_nce",
        "recall",
        "same_texts",
        "twin_accuracy",
    ],
    "datasets": ["Item", "download_dataset", "load_dataset"],
    "decoding": [
        "Specials",
        "TEMPERATURES",
        "caption_manifest",
        "decode",
        "decode_features",
        "decode_manifest",
        "describe",
        "image_key",
        "word_attention",
    ],
    "encoders": ["Encoder", "Preprocessing", "build_encoder"],
    "features": ["encode_images", "extract"],
    "files": ["CapGenError"],
    "grounding": [
        "content_words",
        "deletion_test",
        "deletions",
        "hide",
        "moved",
        "named_object",
        "pointing_game",
        "pointings",
        "top_cells",
        "word_log_probabilities",
    ],
    "images": ["open_bytes", "open_image"],
    "language": ["documents", "initialise", "pretrain_language_model"],
    "logits": ["keep_top_k", "keep_top_p", "penalise_repetition"],
    "machine": ["REPOSITORY"],
    "metrics": [
        "Statistics",
        "agreement",
        "agreement_table",
        "bleu",
        "cider",
        "cider_d",
        "diagnose",
        "diversity",
        "judgement",
        "labels",
        "mean_interval",
        "mutual_bleu",
        "originality",
        "paired_bootstrap",
        "rouge_l",
        "score",
        "score_with_intervals",
    ],
    "onnx_captioner": ["OnnxCaptioner"],
    "onnx_export": ["export_onnx"],
    "plots": ["read_log", "bars"],
    "recipes": ["make_trainer", "prepare", "pretrain_encoder"],
    "rerank": ["rerank"],
    "scenes": ["draw", "make_scene"],
    "scoring": ["mean_features"],
    "shapes": [
        "COLOURS",
        "IMAGE_SIZE",
        "SHAPES",
        "describe",
        "draw",
        "is_true",
        "judge",
        "load_scenes",
        "make_scene",
    ],
    "text": ["WordTokenizer", "tokenise"],
    "twins": ["hard_negatives"],
    "widgets.parts": ["guarded"],
}


@pytest.mark.parametrize("module", EARLIER)
def test_names_of_earlier_notebooks_are_found_with_a_warning(module: str) -> None:
    old = importlib.import_module(f"capgen_utils.{module}")
    for name in EARLIER[module]:
        with pytest.warns(FutureWarning, match=f"{name} is now"):
            assert getattr(old, name) is not None
    with pytest.raises(AttributeError):
        old.no_such_name  # noqa: B018
