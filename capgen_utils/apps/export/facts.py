"""What a bundle holds, in words and numbers: for people, and for pages that describe it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from capgen_utils.bundle import Bundle, load_bundle, scorer_folder


def bundle_facts(folder: Path) -> dict[str, Any]:
    """Return what the bundle in ``folder`` holds; its files are checked as ``load_bundle`` does.

    Returns:
        Model, number of parameters, hyperparameters, the features it reads, encoder, vocabulary,
        decoding defaults, training, dev scores with their protocol, and the files' sizes in bytes.
        What a bundle does not say is ``None``.

    Raises:
        CapGenError: it is damaged.
    """
    bundle = load_bundle(folder)
    info = bundle.info
    files = {
        p.relative_to(folder).as_posix(): p.stat().st_size
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    }
    return {
        "bundle": str(folder),
        "model": info["model"],
        "parameters": sum(p.numel() for p in bundle.model.parameters()),
        "hyperparameters": asdict(bundle.model.config),
        "feature": info["feature"],
        "encoder": {
            key: info["encoder"].get(key)
            for key in ("name", "weights_hash", "public", "preprocessing")
        }
        | {
            "extraction_dtype": info["extraction_dtype"],
            "included": (Path(folder) / "encoder").is_dir(),
        },
        "scorer_included": scorer_folder(Path(folder)) is not None,
        "vocabulary": _vocabulary(bundle),
        "decoding": bundle.decoding.to_json(),
        "training": {
            key: info.get(key) for key in ("preset", "dataset", "step", "revision", "training")
        }
        | {"run": info.get("training_run")},
        "dev": info.get("dev"),
        "files": files,
        "bytes": sum(files.values()),
    }


def _vocabulary(bundle: Bundle) -> dict[str, Any]:
    tokenizer = bundle.tokenizer
    return {
        "kind": tokenizer.kind,
        "tokens": len(tokenizer),
        "never_said": len(tokenizer.banned_ids),
    }


def facts_text(facts: dict[str, Any]) -> str:
    """Return the facts as a table of two columns; what is not known is left out."""
    encoder, training = facts["encoder"], facts["training"]
    run, recipe = _mapping(training["run"]), _mapping(training["training"])
    scores = {k: v for k, v in _mapping(facts["dev"]).items() if isinstance(v, float)}
    place = (
        "in the bundle"
        if encoder["included"]
        else "published weights"
        if encoder["public"]
        else "not included"
    )
    reads = f"{facts['feature']['output']} {' x '.join(map(str, facts['feature']['shape']))}"
    rows = [
        ("bundle", f"{facts['bundle']} ({facts['bytes'] / 1e6:.1f} MB)"),
        ("model", f"{facts['model']}, {facts['parameters']:,} parameters"),
        ("hyperparameters", _pairs(facts["hyperparameters"])),
        (
            "encoder",
            f"{encoder['name']}, {place}, hash {encoder['weights_hash']}, {encoder['extraction_dtype']}",
        ),
        ("reads", reads),
        ("preprocessing", _pairs(encoder["preprocessing"])),
        ("re-ranking", "its own CLIP is in the bundle" if facts["scorer_included"] else ""),
        ("vocabulary", f"{facts['vocabulary']['tokens']:,} tokens ({facts['vocabulary']['kind']})"),
        ("decoding", _pairs(facts["decoding"])),
        ("trained on", ", ".join(str(training[k]) for k in ("dataset", "preset") if training[k])),
        (
            "training",
            _pairs({k: run[k] for k in ("epochs", "best_epoch", "minutes", "dtype") if k in run}),
        ),
        ("recipe", _pairs(recipe)),
        ("code", str(training["revision"] or "")),
        ("dev scores", _pairs({k: f"{v:.2f}" for k, v in scores.items()})),
        ("protocol", str(_mapping(facts["dev"]).get("protocol", ""))),
        ("files", ", ".join(f"{name} {size:,}" for name, size in facts["files"].items())),
    ]
    return "\n".join(f"{name:16s} {value}" for name, value in rows if value)


def _mapping(value: Any) -> dict[str, Any]:
    """A bundle comes from anywhere: what should be a mapping may be something else."""
    return value if isinstance(value, dict) else {}


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)
