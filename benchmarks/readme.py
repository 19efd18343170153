"""``make readme``: writes the figures of results/*.json into the marked blocks of README.md; a test compares them."""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "results"
PICTURED = "dog_panting.jpg"
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(name: str) -> Any:
    """Return the results file ``results/NAME.json``."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def row(*cells: Any) -> str:
    """Return one row of a Markdown table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def setting(facts: Mapping[str, Any]) -> str:
    """Say on what machine and with which versions something was measured."""
    versions = facts["versions"]
    where = facts["accelerator"] or f"{facts['cpu']}, {facts['cores']} cores"
    return f"{where}, torch {versions['torch']}, Python {facts['python']}"


def systems(dataset: str) -> list[tuple[str, Any]]:
    """Return the models whose results on ``dataset`` are there, in the order of the course, with their results."""
    from capgen_utils.presets import PRESETS

    names = [name for name in PRESETS[dataset].models if (RESULTS / f"{dataset}_{name}.json").is_file()]
    return [(name, read(f"{dataset}_{name}")) for name in names]


def minutes(run: Mapping[str, Any] | None) -> str:
    """Say how long a training run took."""
    return f"{run['minutes']:.1f} min" if run else "-"


def flickr8k() -> str:
    """The scores on real photographs, with their protocol."""
    found = systems("flickr8k")
    lines = [
        row("captioner", "parameters", "encoder", "BLEU-1", "BLEU-4", "distinct captions", "training"),
        row(*["---"] * 7),
    ]
    for name, result in found:
        scores, rules = result["scores"], result["protocol"]
        lines.append(
            row(
                f"`{name}`",
                f"{result['parameters'] / 1e6:.1f} M",
                rules["encoder"],
                *(f"{scores[f'BLEU-{n}']:.1f}" for n in (1, 4)),
                f"{scores['distinct']:.0f} of {rules['images']}",
                minutes(result["training_run"]),
            )  # fmt: skip
        )
    rules = found[0][1]["protocol"]
    decoding = {(r["protocol"]["decoding"]["beam"], r["protocol"]["decoding"]["length_penalty"]) for _, r in found}
    wrong = [result["scores"]["BLEU-4 on the wrong images"] for _, result in found]
    lines += [
        "",
        f"Protocol: {rules['dataset']}, official {rules['split']} split, {rules['images']} images, "
        f"{rules['references']} references; BLEU x 100, {rules['BLEU']}; "
        + ", ".join(f"beam {beam}, length penalty {penalty}" for beam, penalty in sorted(decoding))
        + f". The same captions on the wrong images score {min(wrong):.1f} to {max(wrong):.1f} BLEU-4. Trained and "
        f"scored on: {setting(found[0][1]['machine'])}.",
    ]
    return "\n".join(lines)


def shapes() -> str:
    """The truth of captions on drawn scenes, and what each captioner costs."""
    found = systems("shapes")
    columns = {
        "true": "true", "true_shuffled": "true of another scene", "true_novel": "true, unseen pairs",
        "relation_right": "relation right",
    }  # fmt: skip
    lines = [
        row("captioner", "parameters", *columns.values(), "distinct captions", "training"),
        row(*["---"] * (len(columns) + 4)),
    ]
    for name, result in found:
        scores = result["scores"]
        lines.append(
            row(
                f"`{name}`",
                f"{result['parameters'] / 1e6:.1f} M",
                *(f"{100 * scores[key]:.1f} %" for key in columns),
                f"{scores['distinct']:.0f} of {result['protocol']['images']}",
                minutes(result["training_run"]),
            )  # fmt: skip
        )
    pretraining = next(r["pretraining_run"] for _, r in found if r["protocol"]["encoder"] == "shapes_cnn")
    lines += ["", f"Pre-training of the encoder, once for all: {minutes(pretraining)}."]
    return "\n".join(lines)


def speed() -> str:
    """Rates and memory."""
    bench = read("benchmarks")
    extraction, training, decoding = bench["extraction"], bench["training"], bench["decoding"]
    lines = [
        row("work", "rate", "dtype", "peak anonymous memory", "load before"),
        row(*["---"] * 5),
        row(
            f"features of {extraction['images']} photographs, JPEG decoding included ({extraction['encoder']})",
            f"{extraction['images_per_second']} images/s",
            extraction["dtype"],
            f"{extraction['peak_anonymous_gigabytes']} GB",
            extraction["machine"]["load"],
        ),
        row(
            f"training the transformer ({training['parameters'] / 1e6:.1f} M parameters)",
            f"{training['tokens_per_second']} tokens/s",
            training["dtype"],
            f"{training['peak_anonymous_gigabytes']} GB",
            training["machine"]["load"],
        ),
        row(
            "captions from cached features, greedy / beam 5",
            f"{decoding['captions_per_second_beam_1']} / {decoding['captions_per_second_beam_5']} captions/s",
            decoding["dtype"],
            f"{decoding['peak_anonymous_gigabytes']} GB",
            decoding["machine"]["load"],
        ),
        "",
        f"Measured on: {setting(extraction['machine'])}.",
    ]
    return "\n".join(lines)


FIGURES = {"flickr8k": flickr8k, "shapes": shapes, "speed": speed}


def fill(text: str) -> str:
    """Return ``text`` with every marked block made anew from the results files."""
    return BLOCK.sub(lambda block: f"{block[1]}{FIGURES[block[2]]()}\n{block[3]}", text)


def picture() -> None:
    """Draw a sample photograph, its caption, and where the captioner looked for each word, into results/caption.png."""
    from capgen_utils import Captioner
    from capgen_utils.plots import attention_panel

    captioner = Captioner.from_bundle()
    photo = REPOSITORY / "data" / "photos" / PICTURED
    caption, looked = captioner.attention(photo)
    last = list(looked)[-1]
    columns = -(-(len(caption.words) + 1) // 2)
    figure = attention_panel(photo, caption.words, looked[last], captioner.encoder.preprocessing, columns)
    figure.suptitle(caption.text, fontsize=14)
    figure.savefig(REPOSITORY / "results" / "caption.png", dpi=80)


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    from capgen_utils.files import write_text

    picture()

    readme = REPOSITORY / "README.md"
    write_text(readme, fill(readme.read_text(encoding="utf-8")))
