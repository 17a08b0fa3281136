"""The division of work over ranks: arithmetic that every rank and the planner repeat."""

from itertools import pairwise

import pytest

from fastgrpo.parallel.mesh import contiguous_part


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 8, 64])
@pytest.mark.parametrize("total", [0, 1, 2, 5, 8, 63, 64, 65, 384])
def test_contiguous_parts_are_all_of_the_work_in_order_and_of_equal_size(
    total: int, parts: int
) -> None:
    shares = [contiguous_part(total, parts, index) for index in range(parts)]
    assert [position for share in shares for position in share] == list(range(total))
    assert all(left.stop == right.start for left, right in pairwise(shares))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert max(map(len, shares)) == -(-total // parts)
