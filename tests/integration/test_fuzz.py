"""Whatever a header, an index, a config or a GGUF file says, it works or is refused in one clean line."""

from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skipless.checkpoint.headers import INDEX, SINGLE
from skipless.errors import InputError
from tests import hostile

# So many that each test takes a few seconds; benchmarks/fuzz.py tries 100,000.
FUZZED = settings(max_examples=800, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
RANDOMS = st.randoms(use_true_random=False)


@pytest.mark.parametrize("name", hostile.BASES)
def test_what_is_changed_works_before(name, tmp_path):
    refused = hostile.attempt(hostile.write(tmp_path / "case", hostile.BASES[name]), ())
    assert refused is None


def fuzz(folder, base, changes, random):
    """Change one file of a valid checkpoint, and open it."""
    files = dict(hostile.BASES[base])
    for name, change in changes.items():
        files[name] = change(random, files[name])
    return hostile.attempt(hostile.write(folder / "case", files), (hostile.any_request(random),))


@pytest.mark.slow
@FUZZED
@given(random=RANDOMS, base=st.sampled_from(sorted(hostile.CONFIGS)))
def test_any_header(tmp_path, random, base):
    fuzz(tmp_path, base, {SINGLE: hostile.hostile_header}, random)


@pytest.mark.slow
@FUZZED
@given(random=RANDOMS, base=st.sampled_from(["skipless, sharded", "llama, sharded"]))
def test_any_index(tmp_path, random, base):
    fuzz(tmp_path, base, {INDEX: hostile.hostile_index}, random)


@pytest.mark.slow
@FUZZED
@given(random=RANDOMS, base=st.sampled_from(sorted(hostile.CONFIGS)))
def test_any_config(tmp_path, random, base):
    fuzz(tmp_path, base, {"config.json": hostile.hostile_config}, random)


@pytest.mark.slow
@FUZZED
@given(random=RANDOMS)
def test_any_gguf_file(tmp_path, random):
    fuzz(tmp_path, "gguf", {"tiny.gguf": hostile.flipped}, random)


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    return hostile.Unfinished(tmp_path_factory.mktemp("unfinished"))


def test_what_is_changed_is_gone_on_with_before(unfinished):
    assert unfinished.attempt(unfinished.files) is None


@pytest.mark.slow
@settings(FUZZED, max_examples=60)
@given(random=RANDOMS)
def test_any_unfinished_folder(unfinished, random):
    unfinished.attempt(unfinished.changed(random))


@FUZZED
@given(data=st.binary(max_size=200), name=st.sampled_from(["config.json", INDEX, SINGLE]))
def test_any_bytes(tmp_path, data, name):
    base = "skipless, sharded" if name == INDEX else "skipless"
    files = {**hostile.BASES[base], name: data}
    assert hostile.attempt(hostile.write(tmp_path / "case", files)) is not None


@given(message=st.text(max_size=50), times=st.sampled_from([1, 10**3]))
def test_any_message_is_one_line_of_bounded_length(message, times):
    said = str(InputError(message * times))
    assert said.isprintable()
    assert len(said) <= hostile.LONGEST
    assert said == message * times or not message.isprintable() or len(message * times) > hostile.LONGEST


def test_changes_are_the_same_for_the_same_seed():
    base = hostile.BASES["skipless, sharded"]
    assert [hostile.changed(Random(seed), base) for seed in range(50)] == [
        hostile.changed(Random(seed), base) for seed in range(50)
    ]
    assert len({tuple(hostile.changed(Random(seed), base).values()) for seed in range(50)}) > 40
