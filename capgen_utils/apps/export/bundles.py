"""Bundles in other forms: facts, a folder with a model card for the hub, 8 bits per weight."""

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from capgen_utils.bundle import load_bundle, save_bundle, scorer_folder
from capgen_utils.common.files import CapGenError, atomic_path
from capgen_utils.common.paths import repository_address
from capgen_utils.common.tensors import round_to_bytes

LOG_IN = (
    "get a token (huggingface.co, Settings, Access Tokens), then: hf auth login, or set HF_TOKEN"
)
RESEARCH = ("flickr8k", "flickr30k", "coco")  # their images belong to others
DRAWN = ("shapes", "many_shapes")

TEMPLATE = """\
{% macro table(rows) %}
| | |
|---|---|
{% for key, value in rows.items() -%}
| {{ key }} | {{ value }} |
{% endfor %}
{%- endmacro -%}
---
{{ card_data }}
---

# {{ name }}

An image captioner of {{ parameters }} parameters. It reads the output `{{ output }}` of the frozen
image encoder `{{ encoder }}` ({{ source }}). Trained with [CapGen]({{ address }}), a course on
image captioning.

```python
from capgen_utils import Captioner

captioner = Captioner.from_bundle("FOLDER")  # where you downloaded this repository to
print(captioner.caption("photo.jpg")[0].text)
```

## Architecture
{{ table(architecture) }}
## Training
{{ table(training) }}
## Scores
{% if scores %}{{ table(scores) }}
Protocol: {{ protocol }}. This split also chose the epoch, so the scores are slightly optimistic:
publish those of the test split (`capgen evaluate`).
{% else %}
None are recorded in the bundle. `capgen evaluate` measures them, with intervals and baselines.
{% endif %}
## Limits

The captions are fluent whether they are right or wrong, and on images unlike the training images
they are mostly wrong. They repeat the assumptions of those who wrote the training captions, about
gender and occupation for example. Do not use them where a wrong description can do harm: not to
identify people, not to steer vehicles, not as the only description for someone who cannot see the
image.

## Licence

{{ licence }}
"""


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


# --- facts


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
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
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
        "decoding": bundle.decoding.to_json(),
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


# --- the model card


def export_hub(folder: Path, output: Path) -> dict[str, Any]:
    """Write the bundle in ``folder``, checked, with a model card, in one atomic step.

    Args:
        folder: a bundle.
        output: replaced if it exists; ``Captioner.from_bundle`` loads it.

    Returns:
        The facts of the card; see ``bundle_facts``.

    Raises:
        CapGenError: the bundle is damaged, or the folder cannot be written.
    """
    facts = bundle_facts(folder)
    with atomic_path(output) as temporary:
        for name in facts["files"]:
            path = folder / name
            if path.suffix in (".json", ".safetensors") and not path.is_symlink():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, temporary / name)
        (temporary / "README.md").write_text(model_card(facts), encoding="utf-8")
    return facts


def model_card(facts: Mapping[str, Any]) -> str:
    """Return the card: metadata for the hub, then architecture, training, scores and limits."""
    from huggingface_hub import ModelCard

    encoder, vocabulary, training = facts["encoder"], facts["vocabulary"], facts["training"]
    name = f"CapGen {facts['model']} ({training['dataset'] or 'own images'})"
    run = as_mapping(training["run"])
    architecture = {
        "model": facts["model"],
        "hyperparameters": pairs(facts["hyperparameters"]),
        "encoder": f"{encoder['name']}, weights hash {encoder['weights_hash']}, "
        f"run in {encoder['extraction_dtype']}",
        "preprocessing": pairs(encoder["preprocessing"]),
        "vocabulary": f"{vocabulary['tokens']:,} tokens ({vocabulary['kind']})",
        "decoding": pairs(facts["decoding"]),
        "re-ranking": f"{'by the' if facts['scorer_included'] else 'no'} CLIP in this folder",
    }
    history = {
        "dataset": training["dataset"],
        "preset": training["preset"],
        "run": pairs({key: run.get(key) for key in ("epochs", "best_epoch", "minutes")}),
        "recipe": pairs(as_mapping(training["training"])),
        "code": training["revision"],
    }
    return str(
        ModelCard.from_template(
            metadata(facts, name),
            template_str=TEMPLATE,
            name=plain(name),
            parameters=f"{facts['parameters']:,}",
            output=facts["feature"]["output"],
            encoder=plain(encoder["name"]),
            source=encoder_source(facts),
            address=repository_address(),
            architecture={key: plain(value) for key, value in architecture.items()},
            training={key: plain(value) for key, value in history.items() if value},
            scores={plain(metric): f"{value:.2f}" for metric, value in dev_scores(facts).items()},
            protocol=plain(as_mapping(facts["dev"]).get("protocol", "not recorded")),
            licence=licence(training["dataset"]),
        )
    )


def metadata(facts: Mapping[str, Any], name: str) -> Any:
    """Return the metadata of the card, with the dev scores in the hub's format."""
    from huggingface_hub import EvalResult, ModelCardData

    dataset = facts["training"]["dataset"]
    results = [
        EvalResult(
            task_type="image-to-text",
            dataset_type=one_line(dataset),
            dataset_name=one_line(dataset),
            dataset_split="dev",
            metric_type=metric.lower(),
            metric_name=metric,
            metric_value=round(value, 2),
        )
        for metric, value in dev_scores(facts).items()
        if dataset and metric.startswith(("BLEU", "METEOR", "ROUGE", "CIDEr"))
    ]
    return ModelCardData(
        language="en" if dataset in (*DRAWN, *RESEARCH) else None,
        license="mit" if dataset in DRAWN else "other",
        license_name=None if dataset in DRAWN else "mit-code-data-of-others",
        library_name="capgen-utils",
        pipeline_tag="image-to-text",
        tags=["image-captioning", facts["model"], one_line(facts["encoder"]["name"])],
        model_name=one_line(name) if results else None,
        eval_results=results or None,
    )


def dev_scores(facts: Mapping[str, Any]) -> dict[str, float]:
    """Return the dev scores in the bundle."""
    return {
        key: value
        for key, value in as_mapping(facts["dev"]).items()
        if isinstance(value, float) and key.isprintable()
    }


def licence(dataset: Any) -> str:
    """Return the licence of code and weights."""
    if dataset in DRAWN:
        return "Code and weights: MIT. The training images were drawn by the package itself."
    data = (
        f"The training images and captions ({dataset}) belong to others and are for "
        "non-commercial research and teaching; use these weights accordingly."
        if dataset in RESEARCH
        else "The use of the weights depends on the images and captions of their training: "
        "explain it."
    )
    return f"The code is MIT. {data} The encoder's weights have their own licence."


def plain(value: Any) -> str:
    """Return a value of a bundle, which may be hostile, without Markdown and line breaks."""
    return re.sub(r"([|`<>\[\]\\])", r"\\\1", one_line(value))


def one_line(value: Any) -> str:
    """Return a value as printable text on one line."""
    return "".join(c if c.isprintable() else " " for c in str(value))[:1000]


# --- to the hub


def require_pushable(name: str) -> None:
    """Check everything that can be checked before anything is sent.

    Raises:
        CapGenError: the name is invalid, there is no token, or the hub is switched off.
    """
    from huggingface_hub import get_token

    if not re.fullmatch(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", name):
        raise CapGenError(f"{name!r} is no name of a model on the hub", "name it OWNER/NAME")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise CapGenError("HF_HUB_OFFLINE forbids access to the hub", "unset it")
    if not get_token():
        raise CapGenError("there is no token of the Hugging Face hub on this machine", LOG_IN)


def push(folder: Path, name: str) -> str:
    """Upload ``folder`` as the model ``name``; a new model is private.

    Returns:
        Its address.

    Raises:
        CapGenError: see ``require_pushable``; or the hub cannot be reached or refuses the upload.
    """
    from huggingface_hub import HfApi

    require_pushable(name)
    api = HfApi()
    try:
        address = api.create_repo(name, exist_ok=True, private=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a captioner")
    except Exception as error:  # the client raises errors of several libraries
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CapGenError(
            f"the hub did not take {name}: {reason}", f"check name and network; {LOG_IN}"
        ) from error
    return str(address)
