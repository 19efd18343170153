"""``make readme``: writes the figures of results/*.json into the marked blocks of README.md; a test compares them."""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PICTURED = "dog_panting.jpg"
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(name: str) -> Any:
    """Return the results file ``results/NAME.json``."""
    return json.loads((REPOSITORY / "results" / f"{name}.json").read_text(encoding="utf-8"))


def row(*cells: Any) -> str:
    """Return one row of a Markdown table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def setting(facts: Mapping[str, Any]) -> str:
    """Say on what machine and with which versions something was measured."""
    versions = facts["versions"]
    where = facts["accelerator"] or f"{facts['cpu']}, {facts['cores']} cores"
    return f"{where}, torch {versions['torch']}, Python {facts['python']}"


def flickr8k() -> str:
    """The scores on real photographs, with their protocol."""
    result = read("flickr8k_transformer")
    scores, rules = result["scores"], result["protocol"]
    decoding, training = rules["decoding"], result["training_run"]
    lines = [
        row("captioner", "encoder", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "distinct captions", "training"),
        row(*["---"] * 8),
        row(
            f"transformer, {result['parameters'] / 1e6:.1f} M parameters",
            rules["encoder"],
            *(f"{scores[f'BLEU-{n}']:.1f}" for n in (1, 2, 3, 4)),
            f"{scores['distinct']:.0f} of {rules['images']}",
            f"{training['minutes']:.0f} minutes",
        ),
        "",
        f"Protocol: {rules['dataset']}, official {rules['split']} split, {rules['images']} images, "
        f"{rules['references']} references; BLEU x 100, {rules['BLEU']}; beam {decoding['beam']}, length penalty "
        f"{decoding['length_penalty']}. The same captions on the wrong images score "
        f"{scores['BLEU-4 on the wrong images']:.1f} BLEU-4. Trained and scored on: {setting(result['machine'])}.",
    ]
    return "\n".join(lines)


def shapes() -> str:
    """The truth of captions on drawn scenes."""
    result = read("shapes_transformer")
    scores = result["scores"]
    rows = [
        ("captions that are true of their scene", "true"),
        ("the same captions, true of another scene", "true_shuffled"),
        ("true where the scene holds a colour and shape never seen together", "true_novel"),
        ("scenes of two or three shapes with a right relation", "relation_right"),
    ]
    lines = [row("on `shapes`, test split", "share"), row("---", "---")]
    lines += [row(text, f"{100 * scores[key]:.1f} %") for text, key in rows]
    lines += [
        row("distinct captions", f"{scores['distinct']:.0f} of {result['protocol']['images']}"),
        row("training of the captioner", f"{result['training_run']['minutes']:.1f} minutes"),
        row("pre-training of its encoder, once", f"{result['pretraining_run']['minutes']:.1f} minutes"),
    ]
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
