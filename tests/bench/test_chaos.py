from bench.chaos import pauses


def test_a_pause_begins_when_what_was_on_its_way_has_come():
    arrivals = [0.0, 0.1, 0.2, 0.25, 3.25, 3.35]
    assert pauses(arrivals, kills=[0.15]) == ([3.0], [])
    assert pauses(arrivals, kills=[0.21]) == ([3.0], [])
    assert pauses(arrivals, kills=[2.0]) == ([3.0], [])


def test_kills_in_one_silence_are_told_apart_from_a_single_one():
    arrivals = [0.0, 1.0, 4.0, 5.0, 9.0]
    assert pauses(arrivals, kills=[0.9, 2.0, 4.9]) == ([4.0], [3.0])


def test_only_kills_between_a_streams_first_token_and_its_last_make_a_pause():
    assert pauses([1.0, 2.0, 3.0], kills=[0.4, 3.1]) == ([], [])
    assert pauses([], kills=[0.4]) == ([], [])
    assert pauses([1.0], kills=[1.0]) == ([], [])
