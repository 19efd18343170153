"""A bundle as a folder for the Hugging Face hub: its files, and a model card made from them."""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capgen_utils.apps.export.facts import as_mapping, bundle_facts, encoder_source, pairs
from capgen_utils.common.files import CapGenError, atomic_path
from capgen_utils.common.paths import repository_address

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


def export_hub(folder: Path, output: Path) -> dict[str, Any]:
    """Write the bundle in ``folder``, checked, with a model card, in one atomic step.

    Args:
        folder: a bundle.
        output: replaced if it exists; ``Captioner.from_bundle`` loads it.

    Returns:
        The facts of the card; see ``facts.bundle_facts``.

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
    scores = as_mapping(facts["dev"]).items()
    return {key: value for key, value in scores if isinstance(value, float) and key.isprintable()}


def licence(dataset: Any) -> str:
    """Return the licence of code and weights."""
    if dataset in DRAWN:
        return "Code and weights: MIT. The training images were drawn by the package itself."
    data = (
        "The use of the weights depends on the images and captions of their training: explain it."
    )
    if dataset in RESEARCH:
        data = (
            f"The training images and captions ({dataset}) belong to others and are for "
            "non-commercial research and teaching; use these weights accordingly."
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
