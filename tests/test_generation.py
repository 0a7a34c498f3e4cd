"""Batches: nobody is forgotten, and none is larger than one batch of the longest prompts."""

from hypothesis import given
from hypothesis import strategies as st

from seal_peft.generation import make_batches

prompts_and_limits = st.lists(st.tuples(st.integers(1, 5000), st.sampled_from([8, 64, 128])), min_size=1, max_size=60)


@given(pairs=prompts_and_limits, batch_size=st.integers(1, 9))
def test_every_prompt_is_in_one_batch_of_one_limit_within_the_budget(pairs: list, batch_size: int) -> None:
    prompts, limits = [[0] * length for length, _ in pairs], [limit for _, limit in pairs]
    batches = make_batches(prompts, limits, batch_size)
    assert sorted(index for batch in batches for index in batch) == list(range(len(pairs)))
    budget = batch_size * max(max(128, length + limit) for length, limit in pairs)
    sizes = []
    for batch in batches:
        assert len({limits[index] for index in batch}) == 1
        sizes.append(len(batch) * (max(len(prompts[index]) for index in batch) + limits[batch[0]]))
        assert sizes[-1] <= budget


def test_short_prompts_share_a_batch_with_more_others() -> None:
    lengths = [250] * 8 + [500] * 4 + [1000] * 3
    batches = make_batches([[0] * (length - 10) for length in lengths], [10] * 15, 2)
    assert [[lengths[index] for index in batch] for batch in batches] == [
        [500, 500, 500, 250],
        [1000, 1000],
        [1000, 500],
        [250] * 7,
    ]
