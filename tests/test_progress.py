import io

from edgeprune.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_quiet_when_not_a_terminal():
    stream = io.StringIO()
    progress = Progress(stream, clock=iter(range(100)).__next__)
    for i in range(10):
        progress(i, 10, "measuring")
    progress.clear()
    assert stream.getvalue() == ""


def test_time_left_after_two_seconds():
    stream = Terminal()
    times = iter([0.0, 0.0, 1.0, 10.0, 11.0])
    progress = Progress(stream, clock=lambda: next(times))
    progress(0, 10, "measuring")
    progress(1, 10, "measuring")
    assert stream.getvalue() == ""
    progress(5, 10, "measuring")
    assert "50 %" in stream.getvalue()
    assert "10 s left" in stream.getvalue()
    progress(0, 1, "checking")
    assert "checking" in stream.getvalue()


def test_duration():
    assert [duration(s) for s in (4.2, 200, 3900)] == ["4 s", "3 min 20 s", "1 h 5 min"]
