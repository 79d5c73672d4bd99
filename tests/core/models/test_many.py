"""Many prompts over few rows against single runs of `generate`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tq_jax.models import Finished, Sampling, Tally, generate, generate_many, pad_prompts
from tq_jax.models.many import device
from tq_jax.models.many.steps import advance_rows
from tq_jax.models.many.tally import Bar

MOST = 24
WARM = Sampling(temperature=1.5)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return draw_prompts(23, 1, 30, 16, 5, 31, 28, 2, 11, 29, 7)


@pytest.fixture(scope="module")
def long_prompts() -> list[list[int]]:
    """Prompts from which tokens are compressed; 36 tokens are enough for key statistics, 35 are not."""
    return draw_prompts(38, 33, 48, 35, 36, 47, 33, 40, 35, 44, 37)


@pytest.fixture(scope="module")
def limits() -> list[int]:
    return [9, 24, 1, 17, 2, 24, 5, 13, 20, 3, 8]


@pytest.fixture(scope="module")
def alone(tiny, prompts, exact_spec):
    """The tokens of a single run of each prompt, greedy and over an exact cache."""
    return run_alone(tiny, prompts, exact_spec)


@pytest.fixture(scope="module")
def packed_alone(tiny, long_prompts, packed_spec):
    return run_alone(tiny, long_prompts, packed_spec)


@pytest.fixture(params=["exact", "packed"])
def case(request, prompts, long_prompts, exact_spec, packed_spec, alone, packed_alone):
    """Prompts, the spec of a cache and the tokens of single runs."""
    exact = (prompts, exact_spec, alone)
    return exact if request.param == "exact" else (long_prompts, packed_spec, packed_alone)


def draw_prompts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 300, length).tolist() for length in lengths]


def run_alone(decoder, prompts, spec, **options) -> list[list[int]]:
    options |= {"cache_spec": spec, "max_new_tokens": MOST}
    return [generate(decoder, *pad_prompts([prompt]), **options).sequences()[0] for prompt in prompts]


def start(decoder, prompts, *, spec, new, rows=4, **options):
    """A generation whose programs most tests share."""
    return generate_many(decoder, prompts, rows=rows, cache_spec=spec, max_new_tokens=new, chunk=2, **options)


def cut(tokens: list[int], limit: int, stop: tuple[int, ...] = ()) -> list[int]:
    """What is left of a run without stop tokens."""
    end = next((i + 1 for i, token in enumerate(tokens) if token in stop), len(tokens))
    return tokens[: min(end, limit)]


def tokens_of(results: list[Finished]) -> list[list[int]]:
    return [result.tokens for result in results]


@pytest.mark.sampled
def test_greedy_equals_single_runs(tiny, limits, case):
    prompts, spec, single = case
    many = start(tiny, prompts, spec=spec, new=limits)
    found = list(many)
    assert sorted(result.index for result in found) == list(range(len(prompts)))
    assert tokens_of(many.collect()) == [cut(*pair) for pair in zip(single, limits, strict=True)]
    assert {result.reason for result in found} == {"length"}
    assert [many.results[result.index] for result in found] == found


def test_the_packed_case_compresses_and_centres(tiny, packed_spec, long_prompts):
    many = start(tiny, long_prompts, spec=packed_spec, new=MOST)
    next(many)
    cache = many._device.cache
    assert int(cache.compressed.max()) > 36
    assert len({bool(mean) for mean in jnp.any(cache.statistics.mean != 0, axis=(1, 2))}) == 2


def test_one_row_and_three_steps(tiny, exact_spec, prompts, limits, alone):
    short = [index for index, prompt in enumerate(prompts) if len(prompt) <= 16]
    new = [limits[index] for index in short]
    many = start(tiny, [prompts[index] for index in short], rows=1, steps=3, spec=exact_spec, new=new)
    assert [new[result.index] for result in many] == sorted(new, reverse=True)
    assert tokens_of(many.collect()) == [alone[index][: limits[index]] for index in short]
    assert many.tally.used_row_steps == sum(new) - len(new)
    assert many.tally.steps == sum(3 * -(-(count - 1) // 3) for count in new)


def test_more_rows_than_prompts(tiny, exact_spec, prompts, alone):
    many = start(tiny, prompts[:2], spec=exact_spec, new=6)
    assert tokens_of(many.collect()) == [tokens[:6] for tokens in alone[:2]]
    assert many.tally == Tally(prompts=2, finished=2, new_tokens=12, steps=8, row_steps=32, used_row_steps=10)
    assert start(tiny, [], spec=exact_spec, new=6).collect() == []


def test_stop_tokens(tiny, limits, case):
    prompts, spec, single = case
    stop = (single[0][4], single[1][0], single[5][10])
    many = start(tiny, prompts, spec=spec, new=limits, stop_tokens=stop)
    found = many.collect()
    assert tokens_of(found) == [cut(tokens, limit, stop) for tokens, limit in zip(single, limits, strict=True)]
    assert [result.reason == "stop" for result in found] == [result.tokens[-1] in stop for result in found]
    assert found[1] == Finished(1, single[1][:1], "stop")
    # Nothing was drawn for them in the calls that were handed over before their ends were read.
    assert many.tally.new_tokens == sum(len(result.tokens) for result in found)
    assert many.tally.used_row_steps == many.tally.new_tokens - len(prompts)


@pytest.mark.slow
def test_sampling_equals_single_runs(tiny, exact_spec):
    """The tokens of a prompt depend on its index and the key, not on its row or the time."""
    prompts, key, limits = draw_prompts(12, 1, 16, 7, 7, 3, 10), jax.random.key(7), [9, MOST, 1, 17, 2, MOST, 6]
    expected = [
        run_alone(tiny, [prompt], exact_spec, sampling=WARM, key=jax.random.fold_in(key, index))[0][:limit]
        for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    options = {"spec": exact_spec, "sampling": WARM, "key": key}
    assert tokens_of(start(tiny, prompts, new=limits, **options).collect()) == expected
    longest = tokens_of(start(tiny, prompts, new=MOST, **options).collect())
    assert [tokens[:limit] for tokens, limit in zip(longest, limits, strict=True)] == expected
    assert len({tuple(result.tokens) for result in start(tiny, [[5]] * 4, new=9, **options)}) == 4


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_schedule_gives_the_same_tokens(tiny, exact_spec, prompts, alone, data):
    chosen = data.draw(st.lists(st.integers(0, len(prompts) - 1), max_size=9))
    limits = data.draw(st.lists(st.integers(1, MOST), min_size=len(chosen), max_size=len(chosen)))
    stop = tuple(data.draw(st.sets(st.sampled_from(sorted(set().union(*alone))), max_size=7)))
    cancelled = data.draw(st.dictionaries(st.integers(0, 8), st.integers(0, 8), max_size=3))
    expected = [cut(alone[prompt], limit, stop) for prompt, limit in zip(chosen, limits, strict=True)]
    many = start(tiny, [prompts[i] for i in chosen], spec=exact_spec, new=limits, stop_tokens=stop)
    found, held = [], set()
    for seen in range(len(chosen) + 1):
        index = cancelled.get(seen)
        if index is not None and index < len(chosen) and many.cancel(index):
            held.add(index)
        found += [next(many)] if seen < len(chosen) else list(many)
    assert sorted(result.index for result in found) == list(range(len(chosen)))
    for result, full in zip(many.collect(), expected, strict=True):
        assert result.tokens == full[: len(result.tokens)]
        ends = "stop" if full[-1] in stop else "length"
        assert result.reason == ("cancelled" if result.index in held else ends)
        assert result.index in held or result.tokens == full
    assert many.tally.new_tokens == sum(len(result.tokens) for result in found)
    assert many.tally.running == many.tally.waiting == 0


def test_cancellation_frees_rows(tiny, exact_spec, prompts, alone):
    """Of eleven prompts one runs, one waits and one is done when they are cancelled, with two calls in flight."""
    limits = [MOST] * 3 + [9] * 8
    many = start(tiny, prompts, spec=exact_spec, new=limits)
    first = next(many)
    assert first.index == 3
    # Prompt 4 ends in the next call, and prompt 5 has its row in the one after that.
    assert (many.tally.running, len(many._flights)) == (5, 2)
    assert (many.cancel(0), many.cancel(9), many.cancel(3), many.cancel(0)) == (True, True, False, False)
    assert many.tally.running == 4
    rest = list(many)
    assert [result.index for result in rest[:2]] == [0, 9]
    assert [result.reason for result in rest] == ["cancelled"] * 2 + ["length"] * 8
    assert rest[1].tokens == []
    assert 1 <= len(rest[0].tokens) < MOST
    for result in many.collect():
        assert result.tokens == alone[result.index][: len(result.tokens)]
        assert len(result.tokens) == limits[result.index] or result.index in (0, 9)
    with pytest.raises(ValueError, match="index: expected a prompt from 0 to 10, got 11"):
        many.cancel(11)


def test_closing_frees_the_cache(tiny, exact_spec, prompts):
    with start(tiny, prompts, spec=exact_spec, new=[MOST] * 3 + [9] * 8) as many:
        first = next(many)
        assert many._device is not None
    assert many._device is None
    assert many.tally.running == 0
    assert list(many) == []
    assert many.results[first.index] == first
    assert not many.cancel(5)
    with pytest.raises(ValueError, match=r"got a closed generation without prompts \[0, 1, 2, 4"):
        many.collect()


def test_goes_on_after_errors_of_the_caller(tiny, exact_spec, prompts, limits, alone):
    calls, found = [], []

    def progress(tally: Tally):
        calls.append(tally)
        if len(calls) % 2:
            raise RuntimeError("full disk")

    many = start(tiny, prompts, spec=exact_spec, new=limits, progress=progress)
    for _ in range(100):
        try:
            found.append(next(many))
        except RuntimeError:
            continue
        except StopIteration:
            break
    assert tokens_of(many.collect()) == [cut(*pair) for pair in zip(alone, limits, strict=True)]
    assert sorted(result.index for result in found) == list(range(len(prompts)))
    assert [tally.steps for tally in calls] == sorted(tally.steps for tally in calls)
    last = calls[-1]
    assert (last.finished, last.running, last.waiting, last.new_tokens) == (len(prompts), 0, 0, sum(limits))


def test_goes_on_after_errors_of_the_device(tiny, exact_spec, prompts, limits, alone, monkeypatch):
    """A call that fails takes the cache with it: what ran starts again, and what is done stays."""
    calls = []

    def failing(*args, **options):
        calls.append(None)
        if len(calls) in (1, 3, 5):
            args[2].exact_keys.delete()
            raise RuntimeError("out of memory")
        return advance_rows(*args, **options)

    monkeypatch.setattr(device, "advance_rows", failing)
    many, found, errors = start(tiny, prompts, spec=exact_spec, new=limits), [], 0
    while len(found) < len(prompts):
        try:
            found.append(next(many))
        except RuntimeError:
            errors += 1
    assert errors == 3
    assert tokens_of(many.collect()) == [cut(*pair) for pair in zip(alone, limits, strict=True)]
    assert sorted(result.index for result in found) == list(range(len(prompts)))


def test_goes_on_after_errors_of_reading(tiny, exact_spec, prompts, limits, alone, monkeypatch):
    """A call fails, before or after its tokens are known, while another is in flight with prompts in rows of others."""
    read, behind = device.Flight.read, []

    def failing(flight):
        behind.append(len(many._flights))
        if len(behind) == 2:
            raise RuntimeError("out of memory")
        yield from read(flight)
        if len(behind) == 4:
            raise RuntimeError("interrupted")

    monkeypatch.setattr(device.Flight, "read", failing)
    many, found, errors = start(tiny, prompts, spec=exact_spec, new=limits), [], 0
    while len(found) < len(prompts):
        try:
            found.append(next(many))
        except RuntimeError:
            errors += 1
            assert many.tally.running == 0
    assert (errors, behind[1], behind[3]) == (2, 1, 1)
    assert tokens_of(many.collect()) == [cut(*pair) for pair in zip(alone, limits, strict=True)]
    assert sorted(result.index for result in found) == list(range(len(prompts)))


def events_of(monkeypatch, decoder, prompts, **options):
    """A generation that has run, and in order F for prompts handed over, S for steps and R for a call that is read."""
    events = []
    for name, event in (("fill_rows", "F"), ("advance_rows", "S")):
        run = getattr(device, name)
        monkeypatch.setattr(device, name, lambda *a, e=event, run=run, **o: events.append(e) or run(*a, **o))
    read = device.Flight.read
    monkeypatch.setattr(device.Flight, "read", lambda flight: events.append("R") or read(flight))
    many = start(decoder, prompts, **options)
    many.collect()
    monkeypatch.undo()
    return many, "".join(events)


def test_calls_are_handed_over_before_others_are_read(tiny, exact_spec, prompts, alone, monkeypatch):
    """Steps are 8 per call, and the first token of a prompt takes none."""

    def events(count: int, **options) -> str:
        return events_of(monkeypatch, tiny, prompts[:count], spec=exact_spec, **options)[1]

    assert events(1, new=9) == "FSR"
    assert events(1, new=10) == "FSSRR"
    assert events(1, new=MOST) == "FSSRSRR"
    assert events(6, new=1) == "FFFFRR"  # twice prompts of two padded lengths, and no step to do
    # Four prompts end with their first calls, so two others run in the second, of which nothing has been read.
    many, order = events_of(monkeypatch, tiny, prompts[:6], spec=exact_spec, new=9)
    assert order == "FFSFFSRR"
    assert (many.tally.steps, many.tally.used_row_steps) == (16, 6 * 8)
    # The stop token in the first call is read after the second has been handed over, which nobody waits for.
    many, order = events_of(monkeypatch, tiny, prompts[:1], spec=exact_spec, new=MOST, stop_tokens=alone[0][3:4])
    assert order == "FSSR"
    assert many.tally.new_tokens == len(cut(alone[0], MOST, tuple(alone[0][3:4])))


def test_most_new_tokens_first(tiny, exact_spec, prompts):
    """One row shows the order in which prompts start; equal ones keep theirs."""
    short = [prompt for prompt in prompts if len(prompt) <= 16]
    many = start(tiny, short[:5], rows=1, steps=3, spec=exact_spec, new=[3, 9, 3, 24, 9])
    assert [result.index for result in many] == [3, 1, 4, 0, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[1], []]}, r"prompts\[1\]: expected at least one token id, got none"),
        ({"prompts": [[1], [[2]]]}, r"prompts\[1\]: expected at least one token id, got int64 \(1, 1\)"),
        ({"prompts": [[0.5]]}, r"prompts\[0\]: expected at least one token id, got float64 \(1,\)"),
        ({"prompts": [[1], [2], [3, 300]]}, r"prompts\[2\]: expected ids in \[0, 300\), got 3 to 300"),
        (
            {"prompts": [[1], [2] * 120], "max_new_tokens": [4, 10]},
            r"prompts\[1\]: expected cache_spec.max_tokens to have room for 129 tokens \(prompt 120 \+ 10 new - 1\), "
            r"got 128",
        ),
        ({"max_new_tokens": [3, 0]}, r"max_new_tokens of prompts\[1\]: expected at least 1, got 0"),
        ({"max_new_tokens": [3]}, "max_new_tokens: expected a number or 2 of them, got 1"),
        ({"rows": 0}, "rows: expected at least 1, got 0"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"chunk": 0}, "chunk: expected at least 1, got 0"),
        ({"stop_tokens": [4, 300]}, r"stop_tokens: expected ids in \[0, 300\), got \[300\]"),
        ({"sampling": WARM}, "key: expected a random key to sample at temperature 1.5, got None"),
    ],
)
def test_refuses(tiny, exact_spec, change, message, unchecked_shapes):
    arguments = {"prompts": [[1, 2], [3]], "rows": 2, "cache_spec": exact_spec, "max_new_tokens": 3} | change
    with pytest.raises(ValueError, match=message):
        generate_many(tiny, arguments.pop("prompts"), **arguments)


def test_refuses_a_spec_of_another_model_and_more_than_its_context(tiny, exact_spec):
    other = dataclasses.replace(exact_spec, num_kv_heads=3)
    with pytest.raises(ValueError, match=r"expected \(2, 16\), got \(3, 16\)"):
        generate_many(tiny, [[1]], rows=2, cache_spec=other, max_new_tokens=3)
    large = dataclasses.replace(exact_spec, max_tokens=1024, window=1024)
    with pytest.raises(ValueError, match=r"prompts\[0\]: expected the model's context to have room for 514 tokens"):
        generate_many(tiny, [[1] * 500], rows=2, cache_spec=large, max_new_tokens=15)


@pytest.mark.slow
def test_rows_are_used(tiny, exact_spec):
    """200 mixed prompts keep 16 rows busy in more than 85 of 100 row-steps, up to the last token."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 300, length).tolist() for length in rng.integers(1, 16, 200)]
    limits = rng.integers(4, 60, 200).tolist()
    many = start(tiny, prompts, rows=16, spec=exact_spec, new=limits)
    assert [len(tokens) for tokens in tokens_of(many.collect())] == limits
    assert many.tally.used_row_steps == sum(limits) - 200
    assert many.tally.use > 0.85, many.tally


def test_the_bar_shows_counts_and_vanishes(tiny, exact_spec, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    bar = Bar()
    bar(Tally(prompts=4, finished=1, new_tokens=9, row_steps=10, used_row_steps=9))
    shown = capsys.readouterr()
    assert "9 tokens, rows used 90%" in shown.err
    assert shown.out == ""
    bar.close()
    bar.close()
    many = start(tiny, [[1], [2]], spec=exact_spec, new=6, progress=True)
    many.collect()
    assert "2/2" in capsys.readouterr().err
