"""Decoding, compared with brute force on tables, with transformers, and on real captioners."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from torch import Tensor

from capgen_utils.common.files import CapGenError
from capgen_utils.common.hub import import_torchvision
from capgen_utils.config import DecodingConfig
from capgen_utils.decoding.captions import Hypothesis, Specials
from capgen_utils.decoding.logits import (
    draw,
    forbid_repeated_ngrams,
    keep_top_k,
    keep_top_p,
    log_probabilities,
    penalise_repetition,
    uniform_numbers,
)
from capgen_utils.decoding.options import TEMPERATURES, check_decoding, describe, with_options
from capgen_utils.decoding.run import decode_features, word_attention
from capgen_utils.decoding.search import decode
from capgen_utils.models.base import KeyValues, SharedState

START, END, A, B, C = range(5)
SPECIALS = Specials(START, END, (START,))
TWO_WORDS = Specials(START, END, (START, C))
SAME = Specials(END, END, (START,))  # one id begins and ends a caption


@dataclass
class TableState:
    """The image of each hypothesis, and the number of tokens read."""

    image: Tensor
    read: int = 0

    def select(self, rows: Tensor) -> "TableState":
        return TableState(self.image[rows], self.read)


@dataclass
class Table:
    """A captioner with one table of logits per image: last token -> next token."""

    tables: Tensor  # (images, 5, 5), or one for each position: (images, positions, 5, 5)
    rows: list[int] = field(default_factory=list)

    def start(self, memory: Any) -> TableState:
        return TableState(torch.arange(len(self.tables)))

    def step(
        self, tokens: Tensor, state: TableState, attention: bool = False
    ) -> tuple[Tensor, TableState, dict]:
        self.rows.append(len(tokens))
        assert len(tokens) == len(state.image)
        tables = self.tables if self.tables.dim() == 3 else self.tables[:, state.read]
        return tables[state.image, tokens], TableState(state.image, state.read + 1), {}


def random_tables(
    images: int, seed: int = 0, sharpness: float = 1.5, positions: Sequence[int] = ()
) -> Tensor:
    return (
        torch.randn(images, *positions, 5, 5, generator=torch.Generator().manual_seed(seed))
        * sharpness
    )


def decode_tables(
    tables: Tensor, config: DecodingConfig, specials: Specials = SPECIALS
) -> list[list[Hypothesis]]:
    return decode(Table(tables), None, len(tables), specials, config)


# --- slow decoders in plain Python


def ruled(steps: Sequence[float], said: Sequence[int], config: DecodingConfig) -> list[float]:
    """Apply the rules to log-probabilities, given the tokens so far."""
    size, scores = config.no_repeat_ngram, list(steps)
    for token in set(said):
        scores[token] *= config.repetition_penalty
    for i in range(len(said) - size + 1) if size else ():
        if list(said[i : i + size - 1]) == list(said[len(said) - size + 1 :]):
            scores[said[i + size - 1]] = -math.inf
    if len(said) < config.min_length:
        scores[END] = -math.inf
    return scores


Steps = list[list[list[float]]]  # log-probabilities: tokens written, last token, next token


def log_steps(table: Tensor, specials: Specials) -> Steps:
    """The log-probabilities of one image's tables; constant ones are repeated 20 times."""
    tables = table.expand(20, 5, 5) if table.dim() == 2 else table
    return [log_probabilities(table.clone(), specials.banned).tolist() for table in tables]


def ranked(
    words: tuple[int, ...], own: float, total: float, ended: bool, config: DecodingConfig
) -> Hypothesis:
    return Hypothesis(words, own, total / (len(words) + ended) ** config.length_penalty, ended)


def every_caption(
    steps: Steps,
    config: DecodingConfig,
    words: tuple[int, ...],
    own: float,
    total: float,
    last: int,
) -> Iterator[Hypothesis]:
    """Yield all captions that start with ``words``."""
    if len(words) == config.max_length:
        yield ranked(words, own, total, False, config)
        return
    row = steps[len(words)][last]
    for token, score in enumerate(ruled(row, words, config)):
        if score > -math.inf and token == END:
            yield ranked(words, own + row[token], total + score, True, config)
        elif score > -math.inf:
            more = own + row[token], total + score
            yield from every_caption(steps, config, (*words, token), *more, token)


def brute_force(
    table: Tensor, config: DecodingConfig, specials: Specials = SPECIALS
) -> list[Hypothesis]:
    """Score every caption, ended or cut at the maximum length, best first."""
    steps = log_steps(table, specials)
    found = every_caption(steps, config, (), 0.0, 0.0, specials.start)
    return sorted(found, key=lambda h: -h.score)


@dataclass
class SlowGroup:
    """One group of a slow diverse beam search: live (total, own, words), finished ones, and whether
    it is done."""

    live: list[tuple[float, float, tuple[int, ...]]]
    finished: list[Hypothesis] = field(default_factory=list)
    done: bool = False


def advance_slowly(
    group: SlowGroup, steps: Steps, chosen: Counter[int], config: DecodingConfig, specials: Specials
) -> None:
    """One step of one group; ``chosen`` counts the tokens of earlier groups and is updated."""
    size = config.beam // config.groups
    options = []
    for total, own, words in group.live:
        row = steps[len(words)][words[-1] if words else specials.start]
        for token, score in enumerate(ruled(row, words, config)):
            if score > -math.inf:
                total_after = total + score - config.diversity * chosen[token]
                options.append((total_after, own + row[token], words, token))
    options = sorted(options, key=lambda o: -o[0])[: 2 * size]
    ends = [o for o in options[:size] if o[3] == END]
    group.finished += [ranked(words, own, total, True, config) for total, own, words, _ in ends]
    group.live = [(total, own, (*words, t)) for total, own, words, t in options if t != END][:size]
    chosen.update(words[-1] for _, _, words in group.live)
    worst = sorted((h.score for h in group.finished), reverse=True)[size - 1 : size]
    group.done = not group.live or bool(
        worst and group.live[0][0] / len(group.live[0][2]) ** config.length_penalty <= worst[0]
    )


def slow_beam(
    table: Tensor, config: DecodingConfig, specials: Specials = SPECIALS
) -> list[Hypothesis]:
    """Beam search of one image with lists and loops."""
    steps = log_steps(table, specials)
    size = config.beam // config.groups
    groups = [SlowGroup([(0.0, 0.0, ())]) for _ in range(config.groups)]
    for _ in range(config.max_length):
        chosen: Counter[int] = Counter()
        for group in groups:
            if not group.done:
                advance_slowly(group, steps, chosen, config, specials)
    found = []
    for group in groups:
        cut = [
            ranked(words, own, total, False, config)
            for total, own, words in group.live
            if not group.done
        ]
        found += sorted(group.finished + cut, key=lambda h: -h.score)[:size]
    best: dict[tuple[int, ...], Hypothesis] = {}
    for hypothesis in sorted(found, key=lambda h: -h.score):
        best.setdefault(hypothesis.tokens, hypothesis)
    return list(best.values())


def assert_same(found: Sequence[Hypothesis], expected: Sequence[Hypothesis]) -> None:
    assert [(h.tokens, h.ended) for h in found] == [(h.tokens, h.ended) for h in expected]
    for got, want in zip(found, expected, strict=True):
        assert math.isclose(got.score, want.score, abs_tol=1e-4)
        assert math.isclose(got.log_probability, want.log_probability, abs_tol=1e-4)


# A beam that can hold every caption never finds `beam` finished ones before the end, so the early
# finish cannot cut, and no continuation is ever pruned: beam search must then equal brute force
# exactly.
WIDE = (
    100  # of two words there are 31 captions that end within five tokens, and 32 that are cut there
)

RULES: list[dict[str, Any]] = [
    {},
    {"length_penalty": 0.0},
    {"length_penalty": 0.7},
    {"length_penalty": 2.0},
    {"min_length": 2},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.8},
    {"no_repeat_ngram": 1},
    {"no_repeat_ngram": 2},
    {"min_length": 1, "repetition_penalty": 1.2, "no_repeat_ngram": 2, "length_penalty": 0.5},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize(
    ("max_length", "specials"), [(1, SPECIALS), (3, SPECIALS), (5, TWO_WORDS), (3, SAME)]
)
def test_a_wide_beam_equals_brute_force(
    rules: dict[str, Any], max_length: int, specials: Specials
) -> None:
    tables = random_tables(6)
    config = replace(DecodingConfig(beam=WIDE, max_length=max_length), **rules)
    config = replace(config, min_length=min(config.min_length, max_length - 1))
    for table, found in zip(tables, decode_tables(tables, config, specials), strict=True):
        expected = brute_force(table, config, specials)
        known = {h.tokens: h for h in found}
        assert len(known) == len(found) == len(expected)
        assert_same([known[h.tokens] for h in expected], expected)
        assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)


@pytest.mark.parametrize("beam", [2, 3, 5])
def test_a_narrow_beam_reports_true_scores_and_is_rarely_beaten(beam: int) -> None:
    tables = random_tables(50, seed=3)
    config = DecodingConfig(beam=beam, max_length=5)
    right = 0
    for table, found in zip(tables, decode_tables(tables, config), strict=True):
        known = {(h.tokens, h.ended): h for h in brute_force(table, config)}
        best = max(known.values(), key=lambda h: h.score)
        right += found[0].tokens == best.tokens
        assert 1 <= len(found) <= beam
        for h in found:
            assert math.isclose(h.score, known[h.tokens, h.ended].score, abs_tol=1e-4)
            assert h.score <= best.score + 1e-4
    assert right >= 35


@pytest.mark.parametrize("rules", [RULES[0], RULES[3], RULES[-1]], ids=str)
@pytest.mark.parametrize("specials", [SPECIALS, SAME], ids=["apart", "same"])
@pytest.mark.parametrize(
    ("beam", "groups"), [(2, 1), (5, 1), (2, 2), (4, 2), (3, 3), (6, 3), (6, 2)]
)
def test_beams_and_groups_equal_a_slow_search(
    beam: int, groups: int, specials: Specials, rules: dict[str, Any]
) -> None:
    tables = random_tables(30, seed=beam, positions=[6])  # tables that never change make ties
    config = replace(DecodingConfig(beam=beam, groups=groups, diversity=0.8, max_length=6), **rules)
    for table, found in zip(tables, decode_tables(tables, config, specials), strict=True):
        assert_same(found, slow_beam(table, config, specials))


def test_groups_differ_only_with_diversity() -> None:
    tables = random_tables(20, seed=8)
    config = DecodingConfig(beam=4, groups=4, diversity=0.0, max_length=6)
    alike, apart = (decode_tables(tables, replace(config, diversity=d)) for d in (0.0, 5.0))
    assert all(len(found) == 1 for found in alike), "four equal groups come to one caption"
    assert sum(map(len, apart)) > 2 * sum(map(len, alike))
    for found, (best,) in zip(apart, alike, strict=True):
        assert best.tokens in {h.tokens for h in found}, "the first group keeps apart from none"


@pytest.mark.parametrize("specials", [SPECIALS, SAME], ids=["apart", "same"])
@pytest.mark.parametrize(
    "config", [DecodingConfig(beam=1, max_length=6, **rules) for rules in RULES], ids=str
)
def test_a_beam_of_one_is_greedy(config: DecodingConfig, specials: Specials) -> None:
    tables = (
        random_tables(20, seed=1) - 3
    )  # all logits below zero: the penalty multiplies, as on log-probabilities
    for table, hypotheses in zip(tables, decode_tables(tables, config, specials), strict=True):
        steps = log_probabilities(table.clone(), specials.banned)
        logits = table.clone()
        logits[:, list(specials.banned)] = -torch.inf
        said, last, total = [], specials.start, 0.0
        while len(said) < 6 and (not said or last != END):
            scores = ruled(logits[last].tolist(), said, config)
            if max(scores) == -math.inf:
                break
            before, last = last, scores.index(max(scores))
            total += steps[before, last].item()
            said.append(last)
        assert len(hypotheses) == 1
        assert list(hypotheses[0].tokens) == [t for t in said if t != END]
        assert hypotheses[0].ended == (END in said)
        assert math.isclose(hypotheses[0].log_probability, total, abs_tol=1e-4)
        assert math.isclose(
            hypotheses[0].score, total / max(1, len(said)) ** config.length_penalty, abs_tol=1e-4
        )


def test_the_length_penalty_decides_between_short_and_long() -> None:
    table = torch.full((5, 5), -30.0)
    table[START, END], table[START, A] = math.log(0.5), math.log(0.5)
    table[A, B], table[B, C] = math.log(0.9), math.log(0.9)
    table[A, A], table[B, A] = math.log(0.1), math.log(0.1)
    table[C, END] = 0.0

    def best(penalty: float) -> tuple[int, ...]:
        config = DecodingConfig(beam=4, max_length=6, length_penalty=penalty)
        return decode_tables(table[None], config)[0][0].tokens

    assert best(0.0) == () and best(1.0) == (A, B, C)


# --- what must never happen

WAYS: list[dict[str, Any]] = [
    {"beam": 1},
    {"beam": 3},
    {"beam": 4, "groups": 2},
    {"temperature": 1.0},
    {"temperature": 1.3, "samples": 4},
    {"temperature": 1.0, "top_k": 2},
    {"temperature": 2.0, "top_p": 0.7, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_banned_tokens_never_appear(way: dict[str, Any]) -> None:
    tables = random_tables(10)
    tables[:, :, [START, B]] += 50
    found = decode_tables(
        tables, DecodingConfig(max_length=6, **way), Specials(START, END, (START, B))
    )
    said = {token for hypotheses in found for h in hypotheses for token in h.tokens}
    assert said <= {A, C} and said
    assert all(
        math.isfinite(h.log_probability) and h.log_probability <= 0 for hs in found for h in hs
    )


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_caption_that_never_ends_is_cut_and_marked(way: dict[str, Any]) -> None:
    tables = random_tables(3)
    tables[:, :, END] = -torch.inf
    for hypotheses in decode_tables(tables, DecodingConfig(max_length=7, **way)):
        assert hypotheses
        assert all(len(h.tokens) == 7 and not h.ended for h in hypotheses)


@pytest.mark.parametrize("way", WAYS[:3] + [{"temperature": 0.01}], ids=str)
def test_an_end_at_the_last_position_counts(way: dict[str, Any]) -> None:
    table = torch.full((5, 5), -20.0)
    table[START, A], table[A, B], table[B, END] = 5, 5, 5
    (hypotheses,) = decode_tables(table[None], DecodingConfig(max_length=3, **way))
    assert hypotheses[0].tokens == (A, B) and hypotheses[0].ended
    (hypotheses,) = decode_tables(table[None], DecodingConfig(max_length=2, **way))
    assert hypotheses[0].tokens == (A, B) and not hypotheses[0].ended


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_caption_without_a_possible_next_token_is_cut(way: dict[str, Any]) -> None:
    tables = random_tables(4)
    config = DecodingConfig(
        max_length=9, min_length=5, no_repeat_ngram=1, **way
    )  # but there are three words
    for hypotheses in decode_tables(tables, config):
        assert hypotheses and all(sorted(h.tokens) == [A, B, C] and not h.ended for h in hypotheses)
        assert all(math.isfinite(h.score) for h in hypotheses)
    for hypotheses in decode_tables(
        tables, DecodingConfig(max_length=9, **way), Specials(START, END, (0, 1, 2, 3, 4))
    ):
        assert {(h.tokens, h.log_probability, h.ended) for h in hypotheses} == {((), 0.0, False)}


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_nan_scores_end_a_caption(way: dict[str, Any]) -> None:
    tables = random_tables(3)
    tables[1] = torch.nan
    tables[2, A:] = torch.nan
    tables[2, START, END] = -torch.inf
    fine, broken, half = decode_tables(tables, DecodingConfig(max_length=5, **way))
    assert fine and all(math.isfinite(h.score) for hs in (fine, broken, half) for h in hs)
    assert [h.tokens for h in fine] == [
        h.tokens for h in decode_tables(tables[:1], DecodingConfig(max_length=5, **way))[0]
    ]
    assert {(h.tokens, h.ended) for h in broken} == {((), False)}
    assert half and all(len(h.tokens) == 1 and not h.ended for h in half)


@pytest.mark.parametrize(("beam", "groups"), [(1, 1), (2, 1), (5, 1), (100, 1), (6, 3), (100, 50)])
def test_candidates_are_sorted_and_distinct(beam: int, groups: int) -> None:
    config = DecodingConfig(beam=beam, groups=groups, max_length=6)
    for hypotheses in decode_tables(random_tables(30, seed=5), config):
        scores = [h.score for h in hypotheses]
        assert scores == sorted(scores, reverse=True) and len(hypotheses) <= beam
        assert len({(h.tokens, h.ended) for h in hypotheses}) == len(hypotheses)


@pytest.mark.parametrize(
    ("way", "each"),
    [
        ({"beam": 1}, 1),
        ({"beam": 2}, 2),
        ({"beam": 4, "groups": 2}, 4),
        ({"temperature": 0.5, "samples": 3}, 3),
    ],
    ids=str,
)
def test_finished_images_leave_the_batch(way: dict[str, Any], each: int) -> None:
    tables = torch.full((4, 5, 5), -40.0)
    for image in range(4):  # the last says A without end, the others end at once
        tables[image, :, A] = 5.0 if image == 3 else -20.0
        tables[image, :, END] = -20.0 if image == 3 else 5.0
    model = Table(tables)
    found = decode(model, None, 4, SPECIALS, DecodingConfig(max_length=8, **way))
    assert [len(hs[0].tokens) for hs in found] == [0, 0, 0, 8]
    assert model.rows[0] == 4, "the start token is read once for an image"
    assert model.rows[-1] == each, f"rows at each step: {model.rows}"
    assert sum(model.rows) <= 4 + 4 * each + 7 * each


def test_start_and_end_can_be_the_same_id() -> None:
    table = torch.full((5, 5), -20.0)
    table[END, A], table[A, B], table[B, END] = 5, 5, 5
    for way in WAYS:
        config = DecodingConfig(max_length=6, **way)
        hypotheses = decode_tables(
            table[None], replace(config, temperature=min(config.temperature, 0.1)), SAME
        )[0]
        assert hypotheses[0].tokens == (A, B) and hypotheses[0].ended, way


# --- sampling


def sampled(table: Tensor, config: DecodingConfig, draws: int = 40) -> list[Hypothesis]:
    """Sample 100 x ``draws`` captions from one table."""
    tables = table.expand(draws, 5, 5).clone()
    return [h for hs in decode_tables(tables, replace(config, samples=100)) for h in hs]


def chi_square(counts: Counter[Any], expected: dict[Any, float]) -> tuple[float, int]:
    assert set(counts) <= set(expected), "something was drawn that cannot be"
    return sum((counts[key] - n) ** 2 / n for key, n in expected.items()), len(expected) - 1


@pytest.mark.parametrize(
    "way",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"temperature": 1.2, "top_k": 2},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 3, "top_p": 0.9},
    ],
    ids=str,
)
def test_sample_frequencies_match_the_model(way: dict[str, Any]) -> None:
    table = random_tables(1, seed=4)[0]
    found = sampled(table, DecodingConfig(max_length=3, seed=9, **way))
    logits = table.clone()
    logits[:, START] = -torch.inf
    rows = [nucleus(row.tolist(), **way) for row in logits]
    expected: dict[tuple[tuple[int, ...], bool], float] = {}
    for words in itertools.chain.from_iterable(
        itertools.product((A, B, C), repeat=n) for n in range(4)
    ):
        chain = math.prod(rows[a][b] for a, b in itertools.pairwise((START, *words)))
        share = chain if len(words) == 3 else chain * rows[words[-1] if words else START][END]
        if share > 0:
            expected[words, len(words) < 3] = share * len(found)
    assert math.isclose(sum(expected.values()), len(found), rel_tol=1e-6)
    statistic, freedom = chi_square(Counter((h.tokens, h.ended) for h in found), expected)
    assert freedom > 3 and statistic < freedom + 4 * math.sqrt(2 * freedom), (
        "about one in ten thousand is above that by chance"
    )


def nucleus(
    logits: Sequence[float], temperature: float, top_k: int = 0, top_p: float = 1.0
) -> list[float]:
    """Probabilities of the next token after temperature, top-k and top-p, in plain Python."""
    weights = {t: math.exp(value / temperature) for t, value in enumerate(logits)}
    order = sorted(weights, key=lambda t: -weights[t])[: top_k or None]
    total, kept, mass = sum(weights[t] for t in order), [], 0.0
    for token in order:
        if mass < top_p * total:
            kept.append(token)
            mass += weights[token]
    return [weights[t] / mass if t in kept else 0.0 for t in range(len(logits))]


def test_a_low_temperature_is_nearly_greedy_and_a_high_one_is_not() -> None:
    tables = random_tables(50, seed=6)
    greedy = [hs[0].tokens for hs in decode_tables(tables, DecodingConfig(beam=1, max_length=6))]
    share = {}
    for temperature in (0.001, 3.0):
        found = decode_tables(tables, DecodingConfig(temperature=temperature, max_length=6))
        share[temperature] = (
            sum(hs[0].tokens == tokens for hs, tokens in zip(found, greedy, strict=True)) / 50
        )
    assert share[0.001] == 1.0 and share[3.0] < 0.5


def test_samples_depend_only_on_seed_key_and_number() -> None:
    tables = random_tables(6, seed=7)
    config = DecodingConfig(temperature=1.0, max_length=6)

    def tokens(
        images: Sequence[int], keys: Sequence[int] | None, config: DecodingConfig
    ) -> list[list[tuple[int, ...]]]:
        found = decode(Table(tables[list(images)]), None, len(images), SPECIALS, config, keys)
        return [[h.tokens for h in hs] for hs in found]

    whole = tokens(range(6), [50, 51, 52, 53, 54, 55], config)
    assert tokens((4, 1), [54, 51], config) == [whole[4], whole[1]]
    assert (
        tokens(range(6), None, config)
        != whole
        == tokens(range(6), [50, 51, 52, 53, 54, 55], config)
    )
    assert tokens(range(6), [50, 51, 52, 53, 54, 55], replace(config, seed=1)) != whole
    many = tokens(range(6), [50, 51, 52, 53, 54, 55], replace(config, samples=5))
    assert all(one[0] in several for one, several in zip(whole, many, strict=True)), (
        "more samples change none"
    )
    assert len({caption for several in many for caption in several}) > 10


def test_uniform_numbers_fill_the_interval_and_rarely_repeat() -> None:
    numbers = uniform_numbers(3, range(200), 4, 10)
    assert numbers.shape == (800, 10) and numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.02 and len(numbers.unique()) > 7990
    big = 2**64 - 1
    assert torch.equal(uniform_numbers(0, [big], 1, 5), uniform_numbers(0, [7, big], 1, 9)[1:, :5])


def test_draw_inverts_the_distribution_and_never_picks_an_impossible_token() -> None:
    shares = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    numbers = torch.tensor([0.0, 0.2, 0.25, 0.7, 0.75, 0.999, 1 - 2**-24])
    assert draw(shares.expand(7, 6), numbers).tolist() == [1, 1, 3, 3, 4, 4, 4]
    odd = torch.rand(1000, 37).masked_fill(torch.rand(1000, 37) < 0.5, 0)
    odd[:, 5] += 0.1
    for number in (0.0, 0.5, 1 - 2**-24):
        assert (odd.gather(1, draw(odd, torch.full((1000,), number))[:, None]) > 0).all()


def test_candidates_at_all_temperatures_equal_those_at_each() -> None:
    tables = random_tables(8, seed=11, sharpness=3.0)
    config = DecodingConfig(max_length=6, top_p=0.95, seed=4)
    model = Table(tables)
    config = replace(config, temperatures=TEMPERATURES)
    found = decode(model, None, 8, SPECIALS, config)
    assert model.rows[0] == 8 and max(model.rows) <= 8 * len(TEMPERATURES)
    greedy = decode_tables(tables, DecodingConfig(beam=1, max_length=6))
    for hypotheses, (best,) in zip(found, greedy, strict=True):
        assert [h.temperature for h in hypotheses] == pytest.approx(TEMPERATURES)
        assert hypotheses[0].tokens == best.tokens
        assert math.isclose(hypotheses[0].log_probability, best.log_probability, abs_tol=1e-4)
    alone = decode(Table(tables[3:4]), None, 1, SPECIALS, config, keys=[3])
    assert [h.tokens for h in alone[0]] == [h.tokens for h in found[3]]
    few = replace(config, temperatures=TEMPERATURES[:3])
    fewer = decode(Table(tables), None, 8, SPECIALS, few)
    assert [[h.tokens for h in hs] for hs in fewer] == [[h.tokens for h in hs[:3]] for hs in found]
    assert len({h.tokens for hs in found for h in hs}) > 20
    with pytest.raises(CapGenError):
        decode(Table(tables), None, 8, SPECIALS, replace(config, temperatures=(0.0, -1.0)))


# --- the library


@pytest.fixture(scope="module")
def transformers() -> Any:
    import_torchvision()
    import transformers

    return transformers


@pytest.mark.parametrize("k", [1, 3, 40, 1000])
@pytest.mark.parametrize("p", [0.05, 0.3, 0.8, 0.99, 1.0])
def test_top_k_and_top_p_equal_transformers(transformers: Any, k: int, p: float) -> None:
    logits = torch.randn(50, 600) * 3
    logits[:, 7] = -torch.inf
    expected = transformers.TopPLogitsWarper(p)(
        None, transformers.TopKLogitsWarper(k)(None, logits)
    )
    expected = expected if p < 1 else transformers.TopKLogitsWarper(k)(None, logits)
    assert torch.equal(keep_top_p(keep_top_k(logits, k), p), expected)
    assert torch.equal(keep_top_k(logits, 0), logits)
    flat = torch.randn(20, 600) / 10  # so flat that the shortlist does not hold the nucleus
    assert torch.equal(
        keep_top_p(flat, p), transformers.TopPLogitsWarper(p)(None, flat) if p < 1 else flat
    )


@pytest.mark.parametrize("length", [0, 1, 2, 9])
def test_rules_equal_transformers(transformers: Any, length: int) -> None:
    logits, written = torch.randn(30, 12) * 3, torch.randint(0, 12, (30, length))
    before, given = logits.clone(), written.clone()
    for penalty in (0.7, 1.0, 1.5):
        expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(written, logits)
        assert torch.equal(penalise_repetition(logits, written, penalty), expected)
    for size in (1, 2, 3, 4):
        expected = transformers.NoRepeatNGramLogitsProcessor(size)(written, logits)
        assert torch.equal(forbid_repeated_ngrams(logits, written, size), expected)
    assert torch.equal(logits, before) and torch.equal(written, given), (
        "what is given stays as it was"
    )


@dataclass
class PromptState:
    """All tokens of each hypothesis, the one that stands for its image first."""

    tokens: Tensor

    def select(self, rows: Tensor) -> "PromptState":
        return PromptState(self.tokens[rows])


@dataclass
class PlainGPT2:
    """The library's GPT-2 without a cache: the first token stands for the image."""

    model: Any

    def start(self, memory: Tensor) -> PromptState:
        return PromptState(memory[:, None])

    def step(
        self, tokens: Tensor, state: PromptState, attention: bool = False
    ) -> tuple[Tensor, PromptState, dict]:
        state = PromptState(torch.cat([state.tokens, tokens[:, None]], dim=1))
        return self.model(input_ids=state.tokens).logits[:, -1], state, {}


IMAGES = torch.arange(20, 28)  # tokens that stand for images and are never said
LENGTH = 9


@pytest.fixture(scope="module")
def gpt2(transformers: Any) -> Any:
    """A random GPT-2 whose captions end here and there; tokens 0 (start) and 20 to 27 (images) are
    never likely."""
    torch.manual_seed(2)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 24, "initializer_range": 0.25}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=28, **sizes)).eval()
    bias = torch.zeros(28)
    bias[IMAGES], bias[0], bias[1] = -1e4, -1e4, 1.0
    model.lm_head.register_forward_hook(lambda module, inputs, output: output + bias)
    return model


def generate(
    model: Any, start: int, **options: Any
) -> list[list[tuple[tuple[int, ...], bool, float | None]]]:
    """The library's captions of all images: tokens, whether they ended, score."""
    count = options.get("num_return_sequences", 1)
    prompt = torch.stack([IMAGES, torch.full_like(IMAGES, start)], dim=1)
    out = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=LENGTH,
        do_sample=False,
        eos_token_id=1,
        pad_token_id=1,
        bos_token_id=start,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    scores = (
        out.sequences_scores.tolist() if "sequences_scores" in out else [None] * len(out.sequences)
    )
    captions = []
    for ids, score in zip(out.sequences[:, 2:].tolist(), scores, strict=True):
        captions.append((tuple(ids[: ids.index(1)] if 1 in ids else ids), 1 in ids, score))
    return [captions[i : i + count] for i in range(0, len(captions), count)]


def library_rules(transformers: Any, rules: dict[str, Any]) -> dict[str, Any]:
    """The library's options for ``rules``. Its repetition penalty is told to leave out the prompt,
    as ours does."""
    options: dict[str, Any] = {}
    if "repetition_penalty" in rules:
        penalty = transformers.RepetitionPenaltyLogitsProcessor(
            rules["repetition_penalty"], prompt_ignore_length=2
        )
        options["logits_processor"] = transformers.LogitsProcessorList([penalty])
    named = {"no_repeat_ngram": "no_repeat_ngram_size", "min_length": "min_new_tokens"}
    return options | {named[key]: value for key, value in rules.items() if key in named}


GPT2_RULES: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.5},
    {"no_repeat_ngram": 2},
    {"min_length": 4},
    {"repetition_penalty": 1.2, "no_repeat_ngram": 3, "min_length": 3},
]


@pytest.mark.parametrize("rules", GPT2_RULES, ids=str)
@pytest.mark.parametrize("start", [0, 1], ids=["apart", "same"])
def test_greedy_search_equals_transformers(
    transformers: Any, gpt2: Any, start: int, rules: dict[str, Any]
) -> None:
    expected = generate(gpt2, start, **library_rules(transformers, rules))
    config = DecodingConfig(beam=1, max_length=LENGTH, **rules)
    found = decode(PlainGPT2(gpt2), IMAGES, len(IMAGES), Specials(start, 1), config)
    assert [[(h.tokens, h.ended) for h in hs] for hs in found] == [
        [c[:2] for c in cs] for cs in expected
    ]
    assert len({len(hs[0].tokens) for hs in found}) > 1, "captions of one length show little"


@pytest.mark.parametrize("rules", GPT2_RULES, ids=str)
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize(("beam", "start"), [(2, 1), (5, 1), (4, 0)])
def test_beam_search_equals_transformers(
    transformers: Any,
    gpt2: Any,
    beam: int,
    start: int,
    length_penalty: float,
    rules: dict[str, Any],
) -> None:
    options = {
        "num_beams": beam,
        "num_return_sequences": beam,
        "length_penalty": length_penalty,
        "early_stopping": False,
    }
    expected = generate(gpt2, start, **options, **library_rules(transformers, rules))
    config = DecodingConfig(beam=beam, max_length=LENGTH, length_penalty=length_penalty, **rules)
    found = decode(PlainGPT2(gpt2), IMAGES, len(IMAGES), Specials(start, 1), config)
    assert [[(h.tokens, h.ended) for h in hs] for hs in found] == [
        [c[:2] for c in cs] for cs in expected
    ]
    scores = [[c[2] for c in cs] for cs in expected]
    assert [[h.score for h in hs] for hs in found] == [
        pytest.approx(row, abs=1e-4) for row in scores
    ]


# --- real captioners


def tiny_specials() -> Specials:
    return Specials.of(tiny_tokenizer())


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_batch_equals_one_image_at_a_time(way: dict[str, Any]) -> None:
    model, specials = tiny_model(), tiny_specials()
    features = torch.randn(8, 9, 12)
    config = DecodingConfig(max_length=12, **way)
    together = decode_features(model, features, specials, config)
    assert len({hs[0].tokens for hs in together}) > 1, "the random captioner says the same of all"
    for i in range(8):
        (alone,) = decode_features(model, features[i : i + 1], specials, config, keys=[i])
        assert [h.tokens for h in alone] == [h.tokens for h in together[i]]
        for a, b in zip(alone, together[i], strict=True):
            assert math.isclose(a.log_probability, b.log_probability, abs_tol=1e-3)


@pytest.mark.parametrize(
    "way", [*WAYS, {"beam": 4, "repetition_penalty": 1.3, "no_repeat_ngram": 2}], ids=str
)
def test_the_log_probability_is_the_teacher_forced_sum(way: dict[str, Any]) -> None:
    model, specials = tiny_model(), tiny_specials()
    features = torch.randn(4, 9, 12)
    config = DecodingConfig(max_length=12, length_penalty=0.7, **way)
    steered = config.repetition_penalty != 1 and not config.temperature or config.groups > 1
    for image, hypotheses in enumerate(decode_features(model, features, specials, config)):
        for h in hypotheses:
            path = [specials.start, *h.tokens] + [specials.end] * h.ended
            tokens = torch.tensor([path])
            with torch.inference_mode():
                memory = model.encode(features[image : image + 1])
                logits = model(memory, tokens[:, :-1], torch.zeros(1, dtype=torch.long))
            steps = log_probabilities(logits[0].clone(), specials.banned)
            total = steps.gather(1, tokens[0, 1:, None]).sum().item()
            assert math.isclose(h.log_probability, total, abs_tol=1e-3)
            assert steered or math.isclose(h.score, total / (len(path) - 1) ** 0.7, abs_tol=1e-3)
            assert h.temperature == pytest.approx(config.temperature)


def test_attention_of_a_batch_equals_that_of_each_caption() -> None:
    model, specials = tiny_model(), tiny_specials()
    captions = [(4, 5, 6), (), (7,), (8, 9, 4, 5, 6, 7, 8), (9, 9)]
    with torch.inference_mode():
        memory = model.encode(torch.randn(5, 9, 12))
    found = word_attention(model, memory, captions, specials)
    assert [set(looked) for looked in found] == [{"layer0", "layer1"}] * 5
    for image, (caption, looked) in enumerate(zip(captions, found, strict=True)):
        (alone,) = word_attention(model, memory.select(torch.tensor([image])), [caption], specials)
        for name, weights in looked.items():
            assert weights.shape == (len(caption), model.config.n_head, 9)
            torch.testing.assert_close(weights, alone[name], atol=1e-5, rtol=0)
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
    words = (
        [found[3][name][0] for name in ("layer0", "layer1")],
        [found[0][name][0] for name in ("layer0", "layer1")],
    )
    assert not torch.allclose(*words[0]) and not torch.allclose(words[0][0], words[1][0])


def test_a_captioner_without_attention_returns_no_weights() -> None:
    assert word_attention(Table(random_tables(2)), None, [(A, B), (C,)], SPECIALS) == [{}, {}]


def test_a_cache_can_be_continued_twice() -> None:
    cache = KeyValues.new(torch.zeros(1), 1, 2, 1, 3)

    def add(before: KeyValues, value: float) -> tuple[KeyValues, Tensor]:
        after = before.longer()
        return after, after.put(
            0, torch.full((2, 1, 1, 3), value), torch.full((2, 1, 1, 3), -value)
        )[0]

    long = [(cache, torch.empty(0))]
    for i in range(3 * KeyValues.room):
        long.append(add(long[-1][0], float(i)))
    assert long[-1][1][1, 0, :, 0].tolist() == list(range(3 * KeyValues.room))
    forks = [add(long[5][0], value) for value in (50.0, 60.0)]
    assert [keys[0, 0, :, 0].tolist() for _, keys in forks] == [
        [0, 1, 2, 3, 4, 50],
        [0, 1, 2, 3, 4, 60],
    ]
    assert long[-1][1][0, 0, :7, 0].tolist() == [0, 1, 2, 3, 4, 5, 6], "what was there stays"
    picked = forks[0][0].select(torch.tensor([1, 0, 1]))
    assert (
        picked.length == 6
        and picked.blocks[0][:, :6, 0, 0, 0].tolist() == [[0, 1, 2, 3, 4, 50]] * 3
    )
    assert cache.select(torch.tensor([0])).length == 0


def test_later_steps_do_not_change_earlier_states() -> None:
    model, tokens = tiny_model(), torch.tensor([4, 5, 6])
    with torch.inference_mode():
        state: SharedState = model.start(model.encode(torch.randn(3, 9, 12)))
        _, state, _ = model.step(torch.full((3,), 1), state)
        first, after, _ = model.step(tokens, state)
        model.step(tokens + 1, state)
        again, _, _ = model.step(tokens, state)
        deeper, _, _ = model.step(tokens, after)
        fresh, _, _ = model.step(tokens, model.step(tokens, state)[1])
    torch.testing.assert_close(first, again)
    torch.testing.assert_close(deeper, fresh)


# --- what can be asked for

IMPOSSIBLE: list[dict[str, Any]] = [
    {"beam": 0},
    {"beam": -3},
    {"beam": 101},
    {"max_length": 0},
    {"max_length": -1},
    {"max_length": 10**6},
    {"length_penalty": 11},
    {"min_length": -1},
    {"min_length": 5, "max_length": 5},
    {"temperature": -0.1},
    {"temperature": 1e9},
    {"top_k": -1},
    {"top_p": 0.0},
    {"top_p": 1.1},
    {"repetition_penalty": 0.0},
    {"repetition_penalty": -1.0},
    {"no_repeat_ngram": -1},
    {"groups": 0},
    {"groups": 2, "beam": 5},
    {"groups": 5, "beam": 1},
    {"diversity": -1.0},
    {"samples": 0},
    {"samples": 101},
    {"seed": -1},
    {"seed": 2**63},
    {"temperature": math.nan},
    {"top_p": math.nan},
    {"temperatures": (0.5, -1.0)},
    {"temperatures": (math.nan,)},
]


@pytest.mark.parametrize("values", IMPOSSIBLE, ids=str)
def test_impossible_options_are_refused(values: dict[str, Any]) -> None:
    config = replace(DecodingConfig(max_length=20), **values)
    with pytest.raises(CapGenError) as error:
        check_decoding(config)
    assert error.value.remedy
    with pytest.raises(CapGenError):
        decode_tables(random_tables(1), config)


def test_possible_options_pass_unless_the_captioner_is_too_short_for_them() -> None:
    for way in WAYS:
        config = DecodingConfig(max_length=20, **way)
        assert check_decoding(config, 20) is config
        with pytest.raises(CapGenError, match="maximum length") as error:
            check_decoding(config, 19)
        assert "19" in error.value.remedy


IMPLIED: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({}, {}, {}),
    ({}, {"beam": None, "temperature": None}, {}),
    ({}, {"beam": 3}, {"beam": 3}),
    ({}, {"temperature": 0.7}, {"temperature": 0.7}),
    ({}, {"top_p": 0.8}, {"top_p": 0.8, "temperature": 1.0}),
    ({}, {"top_k": 5, "seed": 3}, {"top_k": 5, "seed": 3, "temperature": 1.0}),
    ({}, {"samples": 4}, {"samples": 4, "temperature": 1.0}),
    ({}, {"top_p": 0.8, "temperature": 1.5}, {"top_p": 0.8, "temperature": 1.5}),
    ({}, {"candidates": 3}, {}),
    ({}, {"candidates": 9}, {"beam": 9}),
    ({}, {"candidates": 9, "beam": 4}, {"beam": 4}),
    ({}, {"candidates": 9, "temperature": 1.0}, {"samples": 9, "temperature": 1.0}),
    ({}, {"groups": 2}, {"groups": 2, "beam": 6}),
    ({}, {"groups": 3, "candidates": 7}, {"groups": 3, "beam": 9}),
    ({}, {"groups": 7, "diversity": 1.0}, {"groups": 7, "beam": 7, "diversity": 1.0}),
    ({"temperature": 1.0}, {"beam": 1}, {"beam": 1, "temperature": 0.0}),
    ({"temperature": 1.0}, {"beam": 4}, {"beam": 4, "temperature": 0.0}),
    ({"temperature": 1.0}, {"candidates": 4}, {"samples": 4}),
    ({"temperature": 1.2}, {"top_k": 4}, {"top_k": 4}),
    ({"beam": 4, "groups": 2}, {"diversity": 2.0}, {"diversity": 2.0}),
]


@pytest.mark.parametrize(("own", "options", "changes"), IMPLIED, ids=str)
def test_options_imply_what_they_need(
    own: dict[str, Any], options: Any, changes: dict[str, Any]
) -> None:
    config = DecodingConfig(**own)
    assert with_options(config, **options) == replace(config, **changes)
    check_decoding(with_options(config, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"beam": 5, "temperature": 1.0},
        {"groups": 2, "top_p": 0.5},
        {"beam": 2, "samples": 3},
        {"diversity": 1.0},
        {"candidates": 0},
        {"candidates": -1, "temperature": 1.0},
        {"beam": "5"},
        {"beam": 2.5},
        {"temperature": "hot"},
        {"candidates": 1.5},
        {"top_p": True},
        {"temperature": math.inf},
        {"temperatures": (0.0, 1.0)},
        {"temperatures": (0.0, "1"), "rerank": True},
        {"temperatures": (0.0, 1.0), "rerank": True, "candidates": 3},
    ],
    ids=str,
)
def test_contradictions_and_wrong_types_are_refused(options: Any) -> None:
    with pytest.raises(CapGenError):
        check_decoding(with_options(DecodingConfig(), **options))


def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="beams"):
        with_options(DecodingConfig(), beams=3)


def test_every_search_has_a_description_and_every_option_bounds() -> None:
    said = [describe(DecodingConfig(**way)) for way in WAYS]
    assert len(set(said)) == len(said)
    assert said[0] == "greedy" and said[1] == "beam 3, length penalty 1"
    assert (
        describe(DecodingConfig(temperature=1.5, top_p=0.8))
        == "sampled at temperature 1.5, top-p 0.8, seed 0"
    )
    for option in fields(DecodingConfig):
        low, high, text, metavar = option.metadata["option"]
        assert low < high and text and metavar
        value = getattr(DecodingConfig(), option.name)
        assert value == () or low <= value <= high
