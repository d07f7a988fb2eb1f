"""What aot_check.py counts beside the compiler."""

from experiments.aot.serving import lanes_that_fit


def test_lanes_that_share_pages_hold_what_their_requests_need():
    whole, shared = lanes_that_fit(free=100 * 1024, position=1, lane=0, capacity=1024, page=128)
    assert whole == 100
    # A quarter of the capacity on average, less what the capacity cuts off, and half a page more.
    assert 100 / ((256 + 64) / 1024) < shared < 1.1 * 100 / ((256 + 64) / 1024)
    assert lanes_that_fit(100 * 1024, 1, 0, 1024, 1024) == (100, 100), "control: a page for a whole lane"
    assert lanes_that_fit(100 * 1024, 1, 1024, 1024, 128) == (50, 76), "control: lanes that take as much beside them"


def test_a_lane_more_does_not_fit():
    for capacity, page in ((1000, 128), (4096, 128), (64, 32)):
        held = -(-capacity // page) * page
        whole, _ = lanes_that_fit(7 * held + held / 2, 1, 0, capacity, page)
        assert whole == 7
