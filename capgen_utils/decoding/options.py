"""What can be asked of decoding, and what can not: the same for every engine that finds captions."""

from dataclasses import asdict, replace
from typing import Any, TypedDict, Unpack

from capgen_utils.common.files import CapGenError
from capgen_utils.config import LARGEST_BEAM, DecodingConfig, from_dict

LONGEST = 1024  # tokens a caption may be allowed


_BOUNDS: dict[str, tuple[float, float]] = {
    "beam": (1, LARGEST_BEAM),
    "max_length": (1, LONGEST),
    "length_penalty": (-10, 10),
    "min_length": (0, LONGEST),
    "temperature": (0, 100),
    "top_k": (0, 10**9),
    "top_p": (0.001, 1),
    "repetition_penalty": (0.01, 100),
    "no_repeat_ngram": (0, LONGEST),
    "groups": (1, LARGEST_BEAM),
    "diversity": (0, 1000),
    "samples": (1, LARGEST_BEAM),
    "seed": (0, 2**63 - 1),
}


def check_decoding(config: DecodingConfig, longest: int = LONGEST) -> DecodingConfig:
    """Return ``config`` if it can be done.

    Args:
        config: what is asked for.
        longest: tokens that the captioner can say, see ``longest_caption``.

    Raises:
        CapGenError: a value outside its bounds, or two that contradict each other; says what is
            possible.
    """
    for name, (low, high) in _BOUNDS.items():
        value, high = getattr(config, name), min(high, longest) if name == "max_length" else high
        if not low <= value <= high:
            label = name.replace("max_", "maximum ").replace("min_", "minimum ").replace("_", " ")
            raise CapGenError(
                f"a {label} of {value} is not possible",
                f"ask for {low} or more, and at most {high}",
            )
    if config.min_length >= config.max_length:
        raise CapGenError(
            f"captions of at least {config.min_length} words do not fit into {config.max_length} tokens",
            f"ask for a minimum length of at most {config.max_length - 1}: the end token counts too",
        )
    if config.beam % config.groups:
        raise CapGenError(
            f"a beam of {config.beam} cannot be shared by {config.groups} groups",
            f"ask for a beam that is a multiple of {config.groups}",
        )
    return config


def longest_caption(model: Any) -> int:
    """Return how many tokens a captioner can say, its end token included: it reads the start token
    too."""
    return getattr(model.config, "seq_len", LONGEST + 1) - 1


class DecodingOptions(TypedDict, total=False):
    """Options that replace single values of a ``DecodingConfig``, which describes them; ``None``
    replaces nothing.

    Beside them there is ``candidates``: how many captions to consider for an image. It is the
    number of samples where captions are drawn, and else a beam at least that wide.
    """

    beam: int | None
    max_length: int | None
    length_penalty: float | None
    min_length: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    repetition_penalty: float | None
    no_repeat_ngram: int | None
    groups: int | None
    diversity: float | None
    samples: int | None
    seed: int | None
    candidates: int | None


def with_options(config: DecodingConfig, **options: Unpack[DecodingOptions]) -> DecodingConfig:
    """Return ``config`` with some values replaced, and with what those imply.

    Who asks for top-k, top-p or samples wants captions to be drawn: at temperature 1 unless another
    is given. Who asks
    for a beam or groups wants a search: temperature 0. A beam that is not given is widened until it
    suits the groups.

    Raises:
        CapGenError: an unknown option, a value of the wrong type, or both a search and draws;
            bounds are for ``check_decoding``.
    """
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    wanted = given.pop("candidates", None)
    changed = replace(config, **given)
    from_dict(
        DecodingConfig, asdict(changed) | {"samples": changed.samples if wanted is None else wanted}
    )  # types
    if wanted is not None and wanted < 1:
        raise CapGenError(f"{wanted} candidates are not possible", "ask for 1 or more")
    searches = [name for name in ("beam", "groups") if given.get(name, 1) > 1]
    draws = [name for name in ("temperature", "top_k", "top_p", "samples") if given.get(name)]
    if searches and draws:
        raise CapGenError(
            f"{searches[0]} searches for captions, {draws[0].replace('_', '-')} draws them",
            "ask for one of the two",
        )
    if "diversity" in given and changed.groups == 1:
        raise CapGenError(
            "diversity is kept up between groups, and there is only one",
            "ask for groups too, such as 3",
        )
    if draws and not changed.temperature and "temperature" not in given:
        changed = replace(changed, temperature=1.0)
    elif {"beam", "groups"} & given.keys() and not draws:
        changed = replace(changed, temperature=0.0)
    if wanted is not None and changed.temperature:
        return replace(changed, samples=wanted)
    if "beam" not in given:
        beam, groups = max(changed.beam, wanted or 1), max(changed.groups, 1)
        changed = replace(changed, beam=-(-beam // groups) * groups)
    return changed


def describe(config: DecodingConfig) -> str:
    """Return in words how captions are found: what a table of results says beside its numbers."""
    if config.temperature:
        words = [f"drawn at temperature {config.temperature:g}"]
        words += [f"top-k {config.top_k}"] * bool(config.top_k) + [f"top-p {config.top_p:g}"] * (
            config.top_p < 1
        )
        words += [f"{config.samples} samples"] * (config.samples > 1) + [f"seed {config.seed}"]
    elif config.beam == 1:
        words = ["greedy"]
    else:
        words = [f"beam {config.beam}"]
        words += [f"{config.groups} groups, diversity {config.diversity:g}"] * (config.groups > 1)
        words += [f"length penalty {config.length_penalty:g}"]
    words += [f"minimum length {config.min_length}"] * bool(config.min_length)
    words += [f"repetition penalty {config.repetition_penalty:g}"] * (
        config.repetition_penalty != 1
    )
    words += [f"no {config.no_repeat_ngram}-gram twice"] * bool(config.no_repeat_ngram)
    return ", ".join(words)
