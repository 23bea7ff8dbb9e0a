import time

from engine.timeline import Timeline, process_start_time


def test_stages_of_a_process_that_starts_later_add_up_to_the_whole_too():
    timeline = Timeline()
    timeline.begin("api", "a", 10.0)
    timeline.begin("engine", "b", 10.5)
    timeline.begin("engine", "b", 10.7)  # still the same
    timeline.begin("engine", "c", 11.0)
    timeline.begin("api", "d", 11.5)
    assert timeline.rows(end=12.0) == [
        ("api", "a", "0.00", "1.50"),
        ("api", "d", "1.50", "0.50"),
        ("api", "all", "0.00", "2.00"),
        ("engine", "not started yet", "0.00", "0.50"),
        ("engine", "b", "0.50", "0.50"),
        ("engine", "c", "1.00", "1.00"),
        ("engine", "all", "0.00", "2.00"),
    ]


def test_a_process_began_before_now():
    assert 0 <= time.time() - process_start_time() < 3600
