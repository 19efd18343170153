"""The facts about a bundle, for ``capgen info`` and for model cards."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from capgen_utils.bundle import load_bundle, scorer_folder


def bundle_facts(folder: Path) -> dict[str, Any]:
    """Return the facts about the bundle in ``folder``, checked as ``load_bundle`` does.

    Returns:
        Model, number of parameters, hyperparameters, the features it reads, encoder, vocabulary,
        decoding defaults, training, dev scores with their protocol, and the files' sizes in bytes.
        Anything the bundle does not record is ``None``.

    Raises:
        CapGenError: it is damaged.
    """
    bundle, folder = load_bundle(folder), Path(folder)
    info, tokenizer = bundle.info, bundle.tokenizer
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    encoder = ("name", "weights_hash", "public", "preprocessing")
    training = ("preset", "dataset", "step", "revision", "training")
    return {
        "bundle": str(folder),
        "model": info["model"],
        "parameters": sum(p.numel() for p in bundle.model.parameters()),
        "hyperparameters": asdict(bundle.model.config),
        "feature": info["feature"],
        "encoder": {
            **{key: info["encoder"].get(key) for key in encoder},
            "extraction_dtype": info["extraction_dtype"],
            "included": (folder / "encoder").is_dir(),
        },
        "scorer_included": scorer_folder(folder) is not None,
        "vocabulary": {
            "kind": tokenizer.kind,
            "tokens": len(tokenizer),
            "never_said": len(tokenizer.banned_ids),
        },
        "decoding": asdict(bundle.decoding),
        "training": {key: info.get(key) for key in training} | {"run": info.get("training_run")},
        "dev": info.get("dev"),
        "files": files,
        "bytes": sum(files.values()),
    }


def facts_text(facts: Mapping[str, Any]) -> str:
    """Return the facts as a table of two columns, without the unknown ones."""
    encoder, training, vocabulary = facts["encoder"], facts["training"], facts["vocabulary"]
    run, dev = as_mapping(training["run"]), as_mapping(facts["dev"])
    shape = " x ".join(map(str, facts["feature"]["shape"]))
    rows = {
        "bundle": f"{facts['bundle']} ({facts['bytes'] / 1e6:.1f} MB)",
        "model": f"{facts['model']}, {facts['parameters']:,} parameters",
        "hyperparameters": pairs(facts["hyperparameters"]),
        "encoder": f"{encoder['name']}, {encoder_source(facts)}, hash {encoder['weights_hash']}, "
        f"{encoder['extraction_dtype']}",
        "reads": f"{facts['feature']['output']} {shape}",
        "preprocessing": pairs(encoder["preprocessing"]),
        "re-ranking": "its own CLIP is in the bundle" if facts["scorer_included"] else "",
        "vocabulary": f"{vocabulary['tokens']:,} tokens ({vocabulary['kind']})",
        "decoding": pairs(facts["decoding"]),
        "trained on": ", ".join(str(training[k]) for k in ("dataset", "preset") if training[k]),
        "training": pairs({k: run.get(k) for k in ("epochs", "best_epoch", "minutes", "dtype")}),
        "recipe": pairs(as_mapping(training["training"])),
        "code": str(training["revision"] or ""),
        "dev scores": pairs({k: f"{v:.2f}" for k, v in dev.items() if isinstance(v, float)}),
        "protocol": str(dev.get("protocol", "")),
        "files": ", ".join(f"{name} {size:,}" for name, size in facts["files"].items()),
    }
    return "\n".join(f"{name:16s} {value}" for name, value in rows.items() if value)


def encoder_source(facts: Mapping[str, Any]) -> str:
    """Return where the encoder's weights come from."""
    if facts["encoder"]["included"]:
        return "weights included"
    return "published weights" if facts["encoder"]["public"] else "weights not included"


def as_mapping(value: Any) -> dict[str, Any]:
    """Return ``value`` if it is a mapping, else an empty one: a bundle may come from anywhere."""
    return value if isinstance(value, dict) else {}


def pairs(values: Mapping[str, Any]) -> str:
    """Return the known values with their names on one line."""
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)
