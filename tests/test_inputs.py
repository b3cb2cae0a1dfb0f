"""What several runs of a process share."""

import numpy as np

from softprompt.inputs import Shared


def test_equal_arguments_are_shared_and_none_else():
    calls = []

    def made(argument):
        calls.append(argument)
        return len(calls)

    shared = Shared()
    pairs = np.array([(f"text {i}", "a") for i in range(600)])
    others = pairs.copy()
    others[300, 1] = "b"  # In the midst of what NumPy prints.
    assert repr(pairs) == repr(others)
    assert [shared(made, x) for x in (pairs, others, pairs.copy())] == [1, 2, 1]
    assert [shared(made, x) for x in ([("a", "b")], [("a", "c")], [("a", "b")])] == [3, 4, 3]
    alone = [lambda: 0]  # Does not pickle: it is none but itself.
    assert [shared(made, x) for x in (alone, [lambda: 0], alone)] == [5, 6, 5]
