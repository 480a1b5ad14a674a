"""The pages are whole, contain nothing from elsewhere, and say what they must."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from loadtests import charts, page
from loadtests.run import Run
from loadtests.samples import Outcome
from loadtests.sweep import judged
from loadtests.thresholds import Limits, judge
from tests.loadtests.common import SLO_S, run, sample

ABOUT = {"hardware": "2 cores <x86>"}


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.images: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs)["src"] or "")
        elif tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(html: str) -> Tags:
    tags = Tags()
    tags.feed(html)
    assert tags.open == []
    assert all(re.match(r"data:image/png;base64,iVBOR", image) for image in tags.images)
    assert "http" not in re.sub(r'src="[^"]*"', "", html)
    return tags


@pytest.fixture(scope="module")
def made() -> Run:
    some = [
        sample(at / 20, 0.05 + at % 7 / 10, length, plan=plan)
        for length, plan in ((100, "dense"), (600, "chunked"), (20000, "sparse"))
        for at in range(200)
    ]
    others = [sample(outcome=Outcome.REFUSED), sample(2.0, 12.0, outcome=Outcome.FAILED, reason="<500>", tenant="shop")]
    return run([*some, *others])


def test_a_run_is_one_page_with_its_charts_and_verdicts(made: Run) -> None:
    html = page.of_run(made, judge(made.samples, Limits(goodput=0.5), SLO_S), SLO_S, ABOUT)
    assert len(parsed(html).images) == 10
    for part in ("on the same cores", "1 of 3 missed", "&lt;500&gt;", "shop", "2 cores &lt;x86&gt;", "sparse"):
        assert part in html, part


def test_a_run_without_an_answer_is_a_page_too() -> None:
    empty = run([sample(at, outcome=Outcome.REFUSED) for at in range(9)])
    html = page.of_run(empty, [], SLO_S, ABOUT)
    assert len(parsed(html).images) == 10
    assert "No thresholds" in html


def test_a_sweep_names_its_knee(made: Run) -> None:
    slow = judged(run([sample(at / 40, 5.0) for at in range(400)], scale=2.0), Limits(), SLO_S)
    html = page.of_sweep([judged(made, Limits(), SLO_S), slow], SLO_S, ABOUT)
    assert len(parsed(html).images) == 2
    assert "goodput 0 &gt;= 0.95" in html
    fine = judged(run([sample(at / 10) for at in range(100)]), Limits(), SLO_S)
    assert "The knee is at 10.0 requests/s" in page.of_sweep([slow, fine], SLO_S, ABOUT)
    assert "The knee is above 10.0 requests/s" in page.of_sweep([fine], SLO_S, ABOUT)
    assert "No load was sustained" in page.of_sweep([slow], SLO_S, ABOUT)


def test_percentiles_of_few_answers_are_not_drawn() -> None:
    few = judged(run([sample(at) for at in range(4)]), Limits(), SLO_S)
    (axes,) = charts.sweep_latencies([few], SLO_S).axes
    assert axes.get_legend() is None
    enough = judged(run([sample(at) for at in range(5)]), Limits(), SLO_S)
    (axes,) = charts.sweep_latencies([enough], SLO_S).axes
    assert "1 to 512 tokens" in [label.get_text() for label in axes.get_legend().get_texts()]
