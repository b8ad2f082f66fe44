"""Log lines read back to the values that went in, whatever these hold; only the first rank speaks.

CPU: pytest tests/test_log.py
"""

from helpers import parse_line
from hypothesis import given
from hypothesis import strategies as st

from loopgolf.runtime import Log, format_value


@given(
    st.text(
        st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp", "Zs", "Cf"]) | st.sampled_from(" %\n\t:")
    )
)
def test_any_text_is_one_word_that_reads_back(text):
    event, pairs = parse_line(f"event key:{format_value(text)} last:1")
    assert event == "event" and pairs == {"key": text or "-", "last": "1"}


def test_lines_go_to_the_terminal_and_to_the_file(tmp_path, capsys):
    log, quiet = Log(), Log(quiet=True)
    log.open(tmp_path / "log.txt")
    quiet.open(tmp_path / "quiet.txt")
    for each in (log, quiet):
        each("train", step=3, loss=0.123456, path="a b%20c", note="")
    line = "train step:3 loss:0.1235 path:a%20b%2520c note:-"
    assert capsys.readouterr().out == line + "\n" == (tmp_path / "log.txt").read_text()
    assert parse_line(line) == ("train", dict(step="3", loss="0.1235", path="a b%20c", note="-"))
    assert [p.name for p in tmp_path.iterdir()] == ["log.txt"]
