"""Decoding options: bounds, combinations, descriptions; the same everywhere (notebook 08)."""

from dataclasses import fields, replace
from typing import Any

from capgen_utils.common.files import CapGenError, from_dict
from capgen_utils.config import LARGEST_BEAM, LONGEST, DecodingConfig, Option

SAMPLING = ("temperature", "top_k", "top_p", "samples")  # options that ask for samples
TEMPERATURES = (0.0, 0.01, 0.1, 0.5, 0.7, 1.0, 1.5)  # of re-ranked candidates; 0 is greedy
OPTIONS: dict[str, tuple[type, Option]] = {
    f.name: (float if f.name == "temperatures" else type(f.default), f.metadata["option"])
    for f in fields(DecodingConfig)
    if f.name != "samples"
} | {
    "candidates": (
        int,
        Option(
            1, LARGEST_BEAM, "captions to consider per image: as many samples, or a beam as wide"
        ),
    )
}  # what a user may ask for: name -> type of its value, and Option


def check_decoding(config: DecodingConfig, longest: int = LONGEST) -> DecodingConfig:
    """Return ``config`` if it is possible.

    Args:
        config: how to decode.
        longest: tokens that a caption of this captioner can have, see ``longest_caption``.

    Raises:
        CapGenError: a value is out of bounds, or two contradict each other; says what is possible.
    """
    for option in fields(config):
        low, high, *_ = option.metadata["option"]
        high = min(high, longest) if option.name == "max_length" else high
        value = getattr(config, option.name)
        for number in value if option.name == "temperatures" else (value,):
            if not low <= number <= high:
                name = option.name.replace("temperatures", "temperature").replace("_", " ")
                name = name.replace("max ", "maximum ").replace("min ", "minimum ")
                raise CapGenError(
                    f"a {name} of {number} is not possible", f"choose a value from {low} to {high}"
                )
    if config.min_length >= config.max_length:
        raise CapGenError(
            f"captions of at least {config.min_length} tokens do not fit into {config.max_length}",
            f"choose a minimum length of at most {config.max_length - 1}: the end token counts too",
        )
    if config.beam % config.groups:
        raise CapGenError(
            f"a beam of {config.beam} cannot be split into {config.groups} groups",
            f"choose a beam that is a multiple of {config.groups}",
        )
    return config


def longest_caption(model: Any) -> int:
    """Return the longest caption of a captioner in tokens; it reads the start token as well."""
    return getattr(model.config, "seq_len", LONGEST + 1) - 1


def with_options(config: DecodingConfig, rerank: bool = False, **options: Any) -> DecodingConfig:
    """Return ``config`` with some values replaced, and with what those imply.

    Asking for top-k, top-p or samples implies temperature 1 unless another one is given. Asking for
    a beam or for groups implies temperature 0. A beam that is not given grows to a multiple of the
    groups. Re-ranking implies one candidate at each of ``TEMPERATURES``, unless the options name
    another way to find candidates.

    Args:
        config: the defaults.
        rerank: a CLIP will choose among the candidates.
        options: fields of ``DecodingConfig``; ``None`` keeps the default. Also ``candidates``: how
            many captions to consider per image, which sets the samples, or else a minimum beam.

    Raises:
        CapGenError: a value of the wrong type, or options that contradict each other. Bounds are
            checked by ``check_decoding``.
        TypeError: an unknown option.
    """
    asked = {name: value for name, value in options.items() if value is not None}
    ways = ("beam", "groups", "temperature", "samples", "candidates")
    finders = [name for name in ways if name in asked]
    if rerank and not finders:
        asked = {"temperatures": TEMPERATURES} | asked
    elif finders and "temperatures" not in asked:
        asked["temperatures"] = ()
    candidates = asked.pop("candidates", None)
    changed = replace(config, **asked)
    samples = changed.samples if candidates is None else candidates
    checked = from_dict(DecodingConfig, vars(changed) | {"samples": samples})
    changed = replace(checked, samples=changed.samples)
    _refuse_contradictions(changed, samples, asked, finders, rerank)
    sampling = [name for name in SAMPLING if asked.get(name)]
    if sampling and not changed.temperature and "temperature" not in asked:
        changed = replace(changed, temperature=1.0)
    elif {"beam", "groups"} & asked.keys() and not sampling:
        changed = replace(changed, temperature=0.0)
    if candidates is not None and changed.temperature:
        return replace(changed, samples=candidates)
    if "beam" not in asked:
        beam, groups = max(changed.beam, candidates or 1), max(changed.groups, 1)
        changed = replace(changed, beam=-(-beam // groups) * groups)
    return changed


def _refuse_contradictions(
    config: DecodingConfig, samples: int, asked: dict[str, Any], finders: list[str], rerank: bool
) -> None:
    searches = [name for name in ("beam", "groups") if asked.get(name, 1) > 1]
    sampling = [name for name in SAMPLING if asked.get(name)]
    if samples < 1:
        raise CapGenError(f"{samples} candidates are not possible", "ask for 1 or more")
    if asked.get("temperatures") and not rerank:
        raise CapGenError(
            "several temperatures give candidates for a CLIP to choose from",
            "ask for re-ranking too (--rerank)",
        )
    if asked.get("temperatures") and finders:
        raise CapGenError(
            f"{finders[0]} and temperatures both say how to find candidates",
            "ask for one of the two",
        )
    if searches and sampling:
        raise CapGenError(
            f"{searches[0]} is for beam search, {sampling[0].replace('_', '-')} is for sampling",
            "ask for one of the two",
        )
    if "diversity" in asked and config.groups == 1:
        raise CapGenError(
            "diversity applies between groups, and there is only one",
            "ask for groups too, such as 3",
        )


def describe(config: DecodingConfig) -> str:
    """Return in words how captions are found, as tables of results show it."""
    sampled = bool(config.temperatures or config.temperature)
    listed = ", ".join(f"{temperature:g}" for temperature in config.temperatures)
    parts = {  # what is said -> when
        f"one caption sampled at each of the temperatures {listed}": bool(config.temperatures),
        f"sampled at temperature {config.temperature:g}": sampled and not config.temperatures,
        "greedy": not sampled and config.beam == 1,
        f"beam {config.beam}": not sampled and config.beam > 1,
        f"{config.groups} groups, diversity {config.diversity:g}": not sampled
        and config.groups > 1,
        f"length penalty {config.length_penalty:g}": not sampled and config.beam > 1,
        f"top-k {config.top_k}": sampled and config.top_k > 0,
        f"top-p {config.top_p:g}": sampled and config.top_p < 1,
        f"{config.samples} samples": sampled and config.samples > 1 and not config.temperatures,
        f"seed {config.seed}": sampled,
        f"minimum length {config.min_length}": config.min_length > 0,
        f"repetition penalty {config.repetition_penalty:g}": config.repetition_penalty != 1,
        f"no repeated {config.no_repeat_ngram}-gram": config.no_repeat_ngram > 0,
    }
    return ", ".join(part for part, applies in parts.items() if applies)
