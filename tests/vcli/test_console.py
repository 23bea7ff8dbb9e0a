"""Results off a terminal: plain columns that can be pasted."""

from vcli.console import Status, format_seconds, print_table


def test_table_is_plain_text_off_a_terminal(capsys):
    print_table("run [1]", ["name", "ms", "n"], [("ttft", 1.5, 10), ("a longer [name]", 1234.567, None)], notes=["why"])
    assert capsys.readouterr().out == (
        "run [1]\nname                   ms   n\nttft                 1.50  10\na longer [name]  1,234.57   -\nwhy\n"
    )


def test_quantities_read_as_people_say_them():
    assert [format_seconds(s) for s in (0.0123, 2.25, 75)] == ["12.3 ms", "2.2 s", "1 min 15 s"]


def test_a_stage_without_an_end_does_not_keep_the_end_of_the_one_before():
    with Status() as status:
        status.show("warm-up [1]", 3, 16)
        status.show("measuring [2]", 900)

        (task,) = status._bar.tasks
        assert (task.description.strip(), task.completed, task.total) == ("measuring [2]", 900, None)
