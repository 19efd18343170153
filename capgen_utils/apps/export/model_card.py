"""A bundle as a folder for the Hugging Face hub: its files, and a model card written from what they
say."""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capgen_utils.apps.export.facts import bundle_facts
from capgen_utils.common.files import CapGenError, atomic_path
from capgen_utils.common.paths import repository_address

_NAME = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}")


_LOG_IN = (
    "get a token (huggingface.co, Settings, Access Tokens), then: hf auth login, or set HF_TOKEN"
)


_RESEARCH = ("flickr8k", "flickr30k", "coco")  # whose images belong to others
_DRAWN = ("shapes", "many_shapes")
_LIMITS = """\
It says what was often true of its training images, fluently, and nothing in its voice tells a guess from a sight. Away
from such images it is wrong more often than right. It repeats what people assumed in their captions, about gender and
occupation for one. Do not use it where a wrong description can hurt: not to tell people apart, not to steer, not as the
only description for someone who cannot see the image."""


def export_hub(folder: Path, output: Path) -> dict[str, Any]:
    """Write the bundle in ``folder``, checked, with its model card as ``README.md``, in one atomic
    step.

    Args:
        folder: a bundle.
        output: replaced when it exists; ``Captioner.from_bundle`` loads it is.

    Returns:
        The facts that the card was written from; see ``facts.bundle_facts``.

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
    """Return the card: metadata as the hub reads it, then what the model is, reads, learned from,
    scores and cannot."""
    name = (
        f"CapGen {_plain(facts['model'])} ({_plain(facts['training']['dataset'] or 'own images')})"
    )
    sections = {
        "": f"{_summary(facts)}\n\n{_usage()}",
        "What it is": _table(_parts(facts)),
        "What it learned from": _training(facts),
        "Scores": _scores(facts),
        "Limits": _LIMITS,
        "Licence": _licence(facts),
    }
    body = "\n\n".join(
        f"## {title}\n\n{text}" if title else text for title, text in sections.items()
    )
    return f"---\n{_metadata(facts, name)}\n---\n\n# {name}\n\n{body}\n"


def _metadata(facts: Mapping[str, Any], name: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    training, scores = facts["training"], _dev_scores(facts)
    drawn = training["dataset"] in _DRAWN
    results = (
        [
            EvalResult(
                task_type="image-to-text",
                dataset_type=_line(training["dataset"]),
                dataset_name=_line(training["dataset"]),
                dataset_split="dev",
                metric_type=metric.lower(),
                metric_name=metric,
                metric_value=round(value, 2),
            )
            for metric, value in scores.items()
            if metric.startswith(("BLEU", "METEOR", "ROUGE", "CIDEr"))
        ]
        if training["dataset"]
        else []
    )
    return ModelCardData(  # type: ignore[no-any-return]
        language="en" if drawn or training["dataset"] in _RESEARCH else None,
        license="mit" if drawn else "other",
        license_name=None if drawn else "mit-code-data-of-others",
        library_name="capgen-utils",
        pipeline_tag="image-to-text",
        tags=["image-captioning", facts["model"], _line(facts["encoder"]["name"])],
        model_name=_line(name) if results else None,
        eval_results=results or None,
    ).to_yaml()


def _summary(facts: Mapping[str, Any]) -> str:
    encoder = facts["encoder"]
    place = (
        "in this folder"
        if encoder["included"]
        else "published: installed or fetched by name"
        if encoder["public"]
        else "not included"
    )
    return (
        f"An image captioner of {facts['parameters']:,} parameters. It reads the output `{facts['feature']['output']}` "
        f"of the frozen image encoder `{_plain(encoder['name'])}`, whose weights are {place}. Trained with "
        f"[CapGen]({repository_address()}), a course on image captioning."
    )


def _usage() -> str:
    return (
        "```python\nfrom capgen_utils import Captioner\n\n"
        'captioner = Captioner.from_bundle("FOLDER")  # where you downloaded this repository to\n'
        'print(captioner.caption("photo.jpg")[0].text)\n```'
    )


def _parts(facts: Mapping[str, Any]) -> dict[str, str]:
    encoder, vocabulary = facts["encoder"], facts["vocabulary"]
    return {
        "model": facts["model"],
        "hyperparameters": _pairs(facts["hyperparameters"]),
        "encoder": f"{encoder['name']}, weights hash {encoder['weights_hash']}, run in {encoder['extraction_dtype']}",
        "preprocessing": _pairs(encoder["preprocessing"]),
        "vocabulary": f"{vocabulary['tokens']:,} tokens ({vocabulary['kind']})",
        "decoding": _pairs(facts["decoding"]),
        "re-ranking": "by the CLIP in this folder"
        if facts["scorer_included"]
        else "no CLIP included",
    }


def _training(facts: Mapping[str, Any]) -> str:
    training = facts["training"]
    run = training["run"] if isinstance(training["run"], dict) else {}
    rows = {
        "dataset": training["dataset"],
        "preset": training["preset"],
        "epochs, best one, minutes": ", ".join(
            str(run[k]) for k in ("epochs", "best_epoch", "minutes") if k in run
        ),
        "recipe": _pairs(training["training"] if isinstance(training["training"], dict) else {}),
        "code": training["revision"],
    }
    return _table({key: value for key, value in rows.items() if value})


def _dev_scores(facts: Mapping[str, Any]) -> dict[str, float]:
    dev = facts["dev"] if isinstance(facts["dev"], dict) else {}
    return {
        _plain(key): value
        for key, value in dev.items()
        if isinstance(value, float) and str(key).isprintable()
    }


def _scores(facts: Mapping[str, Any]) -> str:
    scores = _dev_scores(facts)
    if not scores:
        return "None are recorded in the bundle. `capgen evaluate` measures it, with intervals and floors beside it."
    protocol = _plain(facts["dev"].get("protocol", "not recorded"))
    return (
        _table({metric: f"{value:.2f}" for metric, value in scores.items()})
        + f"\n\nProtocol: {protocol}. The epoch was chosen by this split, so it flatters a little: figures to publish "
        "come from the test split (`capgen evaluate`)."
    )


def _licence(facts: Mapping[str, Any]) -> str:
    dataset = facts["training"]["dataset"]
    if dataset in _DRAWN:
        return "Code and weights: MIT. The training images were drawn by the package itself."
    of_others = (
        f"The training images and captions ({_plain(dataset)}) belong to others and are for non-commercial research "
        "and teaching; use these weights accordingly."
        if dataset in _RESEARCH
        else "What may be done with the weights hangs on the images and captions that they learned from: say so here."
    )
    return f"The code is MIT. {of_others} The encoder's weights come under their own licence."


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(
        [
            "| | |",
            "|---|---|",
            *(f"| {_plain(key)} | {_plain(value)} |" for key, value in rows.items()),
        ]
    )


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)


def _plain(value: Any) -> str:
    """A bundle comes from anywhere: its words become neither markup nor a new line of the card."""
    return re.sub(r"([|`<>\[\]\\])", r"\\\1", _line(value))


def _line(value: Any) -> str:
    return "".join(c if c.isprintable() else " " for c in str(value))[:1000]


# --- to the hub


def require_pushable(name: str) -> None:
    """Check what can be checked before anything is sent.

    Raises:
        CapGenError: no such name is possible, there is no token, or the hub is switched off.
    """
    from huggingface_hub import get_token

    if not _NAME.fullmatch(name):
        raise CapGenError(f"{name!r} is no name of a model on the hub", "name it OWNER/NAME")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise CapGenError("HF_HUB_OFFLINE forbids to ask the hub", "unset it")
    if not get_token():
        raise CapGenError("there is no token of the Hugging Face hub on this machine", _LOG_IN)


def push(folder: Path, name: str) -> str:
    """Upload ``folder`` as the model ``name``, which is made where it does not exist, for its owner
    alone to see.

    Returns:
        Its address.

    Raises:
        CapGenError: see ``require_pushable``; or the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    require_pushable(name)
    api = HfApi()
    try:
        address = api.create_repo(name, exist_ok=True, private=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a captioner")
    except Exception as error:  # the client's errors come from several libraries
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CapGenError(
            f"the hub did not take {name}: {reason}", f"check name and network; {_LOG_IN}"
        ) from error
    return str(address)
