"""Greedy and beam search: against brute force on tables of probabilities, and on a real captioner."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from torch import Tensor

from capgen_utils.config import DecodingConfig
from capgen_utils.decoding import Hypothesis, Specials, decode, decode_features, log_probabilities
from capgen_utils.files import CapGenError

START, END, A, B, C = range(5)
SPECIALS = Specials(START, END, (START,))


@dataclass
class TableState:
    """Which image each hypothesis belongs to."""

    image: Tensor

    def select(self, rows: Tensor) -> "TableState":
        return TableState(self.image[rows])


@dataclass
class Table:
    """A captioner that knows one table of logits for each image: last token -> next token."""

    tables: Tensor  # (images, 5, 5)
    rows: list[int] = field(default_factory=list)

    def start(self, memory: Any) -> TableState:
        return TableState(torch.arange(len(self.tables)))

    def step(self, tokens: Tensor, state: TableState, attention: bool = False) -> tuple[Tensor, TableState, dict]:
        self.rows.append(len(tokens))
        assert len(tokens) == len(state.image)
        return self.tables[state.image, tokens], state, {}


def random_tables(images: int, seed: int = 0, sharpness: float = 1.5) -> Tensor:
    return torch.randn(images, 5, 5, generator=torch.Generator().manual_seed(seed)) * sharpness


def brute_force(table: Tensor, config: DecodingConfig, banned: Sequence[int] = (START,)) -> list[Hypothesis]:
    """Score every sequence up to the maximum length, ended or cut there, best first."""
    logits = table.clone()
    logits[:, list(banned)] = -torch.inf
    steps = logits.log_softmax(-1)
    words = [t for t in range(5) if t not in banned and t != END]
    found = []
    for length in range(config.max_length + 1):
        for words_said in itertools.product(words, repeat=length):
            path = [START, *words_said]
            total = sum(steps[a, b].item() for a, b in itertools.pairwise(path))
            if length < config.max_length:
                ended = total + steps[path[-1], END].item()
                size = length + 1
                found.append(Hypothesis(words_said, ended, ended / size**config.length_penalty, True))
            else:
                found.append(Hypothesis(words_said, total, total / length**config.length_penalty, False))
    return sorted(found, key=lambda h: -h.score)


# A beam that can hold every sequence never finds `beam` finished ones before the end, so the early finish cannot cut,
# and no continuation is ever pruned: beam search must then equal brute force exactly.
WIDE = 400  # there are 3^5 + 3^4 + ... + 1 = 364 sequences of at most five tokens


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("max_length", [1, 2, 5])
def test_a_wide_beam_is_brute_force(length_penalty: float, max_length: int) -> None:
    tables = random_tables(6)
    config = DecodingConfig(beam=WIDE, max_length=max_length, length_penalty=length_penalty)
    for table, found in zip(tables, decode(Table(tables), None, 6, SPECIALS, config), strict=True):
        expected = brute_force(table, config)
        assert len(found) == len(expected)
        for got, want in zip(found[:20], expected[:20], strict=True):
            assert math.isclose(got.score, want.score, abs_tol=1e-4)
        assert {h.tokens for h in found} == {h.tokens for h in expected}
        best = {h.tokens: h for h in expected}
        assert all(math.isclose(h.log_probability, best[h.tokens].log_probability, abs_tol=1e-4) for h in found)


@pytest.mark.parametrize("beam", [2, 3, 5])
def test_a_narrow_beam_reports_true_scores_and_is_rarely_beaten(beam: int) -> None:
    tables = random_tables(50, seed=3)
    config = DecodingConfig(beam=beam, max_length=5)
    right = 0
    for table, found in zip(tables, decode(Table(tables), None, 50, SPECIALS, config), strict=True):
        known = {(h.tokens, h.ended): h for h in brute_force(table, config)}
        best = max(known.values(), key=lambda h: h.score)
        right += found[0].tokens == best.tokens
        assert 1 <= len(found) <= beam
        for h in found:
            assert math.isclose(h.score, known[h.tokens, h.ended].score, abs_tol=1e-4)
            assert h.score <= best.score + 1e-4
    assert right >= 35


def test_a_beam_of_one_is_greedy() -> None:
    tables = random_tables(20, seed=1)
    found = decode(Table(tables), None, 20, SPECIALS, DecodingConfig(beam=1, max_length=6))
    for table, hypotheses in zip(tables, found, strict=True):
        steps = log_probabilities(table.clone(), (START,))
        said, last, total = [], START, 0.0
        while len(said) < 6 and last != END:
            last = int(steps[last].argmax())
            total += steps[said[-1] if said else START, last].item()
            said.append(last)
        assert len(hypotheses) == 1
        assert list(hypotheses[0].tokens) == [t for t in said if t != END]
        assert hypotheses[0].ended == (END in said)
        assert math.isclose(hypotheses[0].log_probability, total, abs_tol=1e-4)


def test_the_length_penalty_decides_between_short_and_long() -> None:
    table = torch.full((5, 5), -30.0)
    table[START, END], table[START, A] = math.log(0.5), math.log(0.5)
    table[A, B], table[B, C] = math.log(0.9), math.log(0.9)
    table[A, A], table[B, A] = math.log(0.1), math.log(0.1)
    table[C, END] = 0.0

    def best(penalty: float) -> tuple[int, ...]:
        config = DecodingConfig(beam=4, max_length=6, length_penalty=penalty)
        return decode(Table(table[None]), None, 1, SPECIALS, config)[0][0].tokens

    assert best(0.0) == () and best(1.0) == (A, B, C)


# --- what must never happen -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("beam", [1, 3])
def test_banned_tokens_never_appear_however_likely(beam: int) -> None:
    tables = random_tables(10)
    tables[:, :, [START, B]] += 50
    found = decode(Table(tables), None, 10, Specials(START, END, (START, B)), DecodingConfig(beam=beam, max_length=6))
    said = {token for hypotheses in found for h in hypotheses for token in h.tokens}
    assert said <= {A, C} and said
    assert all(math.isfinite(h.log_probability) and h.log_probability <= 0 for hs in found for h in hs)


@pytest.mark.parametrize("beam", [1, 3])
def test_a_caption_that_never_ends_is_cut_and_says_so(beam: int) -> None:
    tables = random_tables(3)
    tables[:, :, END] = -torch.inf
    for hypotheses in decode(Table(tables), None, 3, SPECIALS, DecodingConfig(beam=beam, max_length=7)):
        assert hypotheses
        assert all(len(h.tokens) == 7 and not h.ended for h in hypotheses)


@pytest.mark.parametrize("beam", [1, 3])
def test_an_end_at_the_last_place_counts_as_an_end(beam: int) -> None:
    table = torch.full((5, 5), -20.0)
    table[START, A], table[A, B], table[B, END] = 5, 5, 5
    (hypotheses,) = decode(Table(table[None]), None, 1, SPECIALS, DecodingConfig(beam=beam, max_length=3))
    assert hypotheses[0].tokens == (A, B) and hypotheses[0].ended
    (hypotheses,) = decode(Table(table[None]), None, 1, SPECIALS, DecodingConfig(beam=beam, max_length=2))
    assert hypotheses[0].tokens == (A, B) and not hypotheses[0].ended


@pytest.mark.parametrize("beam", [1, 2, 5, 100])
def test_candidates_are_sorted_and_distinct(beam: int) -> None:
    tables = random_tables(30, seed=5)
    for hypotheses in decode(Table(tables), None, 30, SPECIALS, DecodingConfig(beam=beam, max_length=6)):
        scores = [h.score for h in hypotheses]
        assert scores == sorted(scores, reverse=True) and len(hypotheses) <= beam
        assert len({(h.tokens, h.ended) for h in hypotheses}) == len(hypotheses)


@pytest.mark.parametrize("beam", [1, 2])
def test_images_that_are_done_leave_the_batch(beam: int) -> None:
    tables = torch.full((4, 5, 5), -40.0)
    for image in range(4):  # image i says A i times, in effect: the others end at once
        tables[image, :, A] = 5.0 if image == 3 else -20.0
        tables[image, :, END] = -20.0 if image == 3 else 5.0
    model = Table(tables)
    found = decode(model, None, 4, SPECIALS, DecodingConfig(beam=beam, max_length=8))
    assert [len(hs[0].tokens) for hs in found] == [0, 0, 0, 8]
    assert model.rows[0] == 4
    assert model.rows[-1] == beam, f"rows at each step: {model.rows}"
    assert sum(model.rows) <= 4 + 4 * beam + 7 * beam


@pytest.mark.parametrize(("beam", "max_length"), [(0, 5), (-3, 5), (2, 0), (1, -1)])
def test_impossible_options_are_refused(beam: int, max_length: int) -> None:
    with pytest.raises(CapGenError):
        decode(Table(random_tables(1)), None, 1, SPECIALS, DecodingConfig(beam=beam, max_length=max_length))


# --- a real captioner -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beam", [1, 2, 4])
def test_a_batch_equals_one_image_at_a_time(beam: int) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    specials = Specials(tokenizer.start_id, tokenizer.end_id, tokenizer.banned_ids)
    features = torch.randn(8, 9, 12)
    config = DecodingConfig(beam=beam, max_length=12)
    together = decode_features(model, features, specials, config)
    assert len({hs[0].tokens for hs in together}) > 1, "the random captioner says the same of all"
    for i in range(8):
        (alone,) = decode_features(model, features[i : i + 1], specials, config)
        assert [h.tokens for h in alone] == [h.tokens for h in together[i]]
        for a, b in zip(alone, together[i], strict=True):
            assert math.isclose(a.log_probability, b.log_probability, abs_tol=1e-3)


@pytest.mark.parametrize("beam", [1, 4])
def test_the_log_probability_is_the_teacher_forced_sum(beam: int) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    specials = Specials(tokenizer.start_id, tokenizer.end_id, tokenizer.banned_ids)
    features = torch.randn(4, 9, 12)
    config = DecodingConfig(beam=beam, max_length=12, length_penalty=0.7)
    for image, hypotheses in enumerate(decode_features(model, features, specials, config)):
        for h in hypotheses:
            path = [specials.start, *h.tokens] + [specials.end] * h.ended
            tokens = torch.tensor([path])
            with torch.inference_mode():
                logits = model(
                    model.encode(features[image : image + 1]), tokens[:, :-1], torch.zeros(1, dtype=torch.long)
                )
            steps = log_probabilities(logits[0].clone(), specials.banned)
            total = steps.gather(1, tokens[0, 1:, None]).sum().item()
            assert math.isclose(h.log_probability, total, abs_tol=1e-3)
            assert math.isclose(h.score, total / (len(path) - 1) ** 0.7, abs_tol=1e-3)
