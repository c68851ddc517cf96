"""The labelling page in Chromium: by keyboard, over reloads and kills of the server, and for assistive technology."""

import random
import shutil

import pytest

pytest.importorskip("playwright")
pytest.importorskip("starlette")
import page_cases as cases
from playwright import sync_api

from rlhf_jax.feedback import store
from rlhf_jax.feedback.judgements import Completion, Item, Prompt

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--no-first-run"]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as running:
        yield running.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


def signed_in(browser, server, token, **options):
    page = browser.new_context(**({"viewport": {"width": 1200, "height": 800}} | options)).new_page()
    page.set_default_timeout(120_000)
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("dialog", lambda dialog: page.problems.append(dialog.message))
    page.goto(server.url)
    page.get_by_label("Your token").fill(token)
    page.keyboard.press("Enter")
    page.wait_for_url("**/instructions")
    page.goto(f"{server.url}/judge")
    return page


def completions(page):
    return page.locator(".completion .text").all_inner_texts()


def answer(page):
    """Chooses an answer by keyboard: the good one of a pair, and answers 0, 1, … of a ranking in this order."""
    texts = completions(page)
    if page.locator("form.ranking").count():
        for place in sorted(range(len(texts)), key=lambda place: int(texts[place].split()[1])):
            page.keyboard.press("ABCDEFGHI"[place])
    else:
        page.keyboard.press("1" if texts[0].startswith("good") else "8")


def judged(page):
    return int(page.locator(".progress span").inner_text().split()[0])


@pytest.mark.parametrize(
    ("n_pairs", "n_rankings", "n_kills"), [(8, 2, 2), pytest.param(100, 20, 20, marks=pytest.mark.slow)]
)
def test_nothing_is_lost_or_doubled_while_the_server_is_killed(browser, tmp_path, n_pairs, n_rankings, n_kills):
    path, rng = tmp_path / "a.sqlite", random.Random(0)
    with store.Store(path) as opened:
        ids = opened.add([*cases.rankings(n_rankings), *cases.pairs(n_pairs)], set_name="a")
        tokens = {name: opened.add_labeler(name) for name in ("Ada", "Ben")}
    n = n_pairs + n_rankings
    kills = set(rng.sample(range(n), n_kills))
    with cases.Server(path, cases.free_port()) as server:
        ada, ben = (signed_in(browser, server, tokens[name]) for name in ("Ada", "Ben"))
        for done in range(n):
            assert judged(ada) == done
            answer(ada)
            if done % 5 == 1:
                ada.reload()  # what was chosen is still there
                if not ada.locator("form.ranking").count():
                    assert ada.locator("input[name=answer]:checked").count() == 1
            answer(ben)
            if done in kills and done % 2:
                server.kill()
            ada.keyboard.press("Enter")
            ben.keyboard.press("Enter")
            if done in kills:
                if not done % 2:
                    ada.wait_for_timeout(rng.uniform(0, 30))
                    server.kill()
                server.start()
            for page in (ada, ben):
                if done + 1 < n:
                    page.locator(".progress span", has_text=f"{done + 1} done").wait_for()
                else:
                    page.get_by_text("Nothing is left to label").wait_for()
        assert ada.problems == ben.problems == []
    with store.Store(path, read_only=True) as opened:
        history = opened.history("a")
        assert sorted((each.labeler, each.item) for each in history) == sorted((m, i) for m in tokens for i in ids)
        for each in history:
            if each.judgement.ranks is None:
                assert each.judgement.strength == 1
            else:
                assert each.judgement.ranks == (1, 2, 3, 4, 5)
            assert each.judgement.seconds is not None


TEXTS = (
    "Code:\n```python\nprint('a long line ' * 20, 'another argument', 'and one more that is wider than a phone')\n```",
    "مرحبا بالعالم، هذا نص عربي طويل نسبيا.",
    "👩‍👩‍👧 <script>alert(1)</script> \x1b[31mred \u202egnirts",
    "A long answer. " * 500,
    "x" * 2000,
)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server with an item of each kind, a token, and the paths of pages."""
    path = tmp_path_factory.mktemp("kinds") / "a.sqlite"
    prompt = Prompt(({"role": "user", "content": TEXTS[1]}, {"role": "assistant", "content": TEXTS[0]}))
    every = [tuple(map(Completion, TEXTS[start:stop])) for start, stop in ((0, 2), (2, 4), (0, 5), (4, 5))]
    with store.Store(path) as opened:
        ids = opened.add([Item(prompt=prompt, completions=each) for each in every], set_name="a")
        ids += opened.add(cases.rankings(1), set_name="a")
        token = opened.add_labeler("Ada")
        for each in ids:
            opened.assign("Ada", set_name="a", item=each)
    with cases.Server(path, cases.free_port()) as server:
        yield (
            server,
            token,
            ["/instructions", "/answers", "/chat", "/no-such-page", *(f"/judge?item={id}" for id in ids)],
        )


@pytest.mark.parametrize("options", [{}, {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark"}])
def test_assistive_technology_finds_no_fault_and_nothing_is_too_wide(browser, served, options):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    server, token, paths = served
    page = signed_in(browser, server, token, **options)
    for path in paths:
        page.goto(server.url + path)
        found = axe.run(page)
        assert found.violations_count == 0, (path, found.generate_report())
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0, path
    assert page.problems == []


def test_rankings_are_sorted_by_dragging_and_by_buttons(browser, served):
    server, token, paths = served
    page = signed_in(browser, server, token, viewport={"width": 1200, "height": 1400})
    page.goto(server.url + paths[-1])
    cards = page.locator(".completion")
    ranks = lambda: [page.locator(f"select[name=rank-{i}]").input_value() for i in range(5)]  # noqa: E731
    assert ranks() == [""] * 5
    page.get_by_role("button", name="Move answer A down").click()
    assert ranks() == ["2", "1", "3", "4", "5"]
    page.keyboard.press("Enter")  # the button has the focus: A moves on
    assert ranks() == ["3", "1", "2", "4", "5"]
    cards.nth(4).drag_to(cards.nth(0), target_position={"x": 20, "y": 2})
    assert ranks() == ["4", "2", "3", "5", "1"]
    page.locator("body").press("Backspace")
    assert ranks() == [""] * 5
    page.keyboard.press("Enter")
    page.get_by_text("Give each answer a rank first").wait_for()
    page.locator("select[name=rank-0]").select_option("1")
    page.locator("body").click(position={"x": 1, "y": 1})
    page.keyboard.press("?")
    assert page.locator("input[name=answer]:checked").count() == 1 and ranks() == [""] * 5
    page.keyboard.press("C")
    assert page.locator("input[name=answer]:checked").count() == 0 and ranks()[2] == "1"
    page.keyboard.press("?")
    page.keyboard.press("Backspace")
    assert page.locator("input[name=answer]:checked").count() == 0


def test_an_answer_cannot_be_changed_on_its_way_and_survives_a_reload(browser, tmp_path):
    path = tmp_path / "a.sqlite"
    with store.Store(path) as opened:
        opened.add(cases.pairs(2), set_name="a")
        token = opened.add_labeler("Ada")
    with cases.Server(path, cases.free_port()) as server:
        page = signed_in(browser, server, token)
        page.get_by_text("Comment", exact=True).click()
        page.get_by_label("Comment on your answer").fill("why")
        page.wait_for_timeout(1500)
        page.reload()
        assert page.get_by_label("Comment on your answer").is_visible()
        page.locator("body").click(position={"x": 1, "y": 1})
        page.keyboard.press("4")
        server.kill()
        page.keyboard.press("Enter")
        page.get_by_text("The server does not answer").wait_for()
        page.keyboard.press("5")
        assert page.locator("input[name=answer]:checked").get_attribute("value") == "4"
        server.start()
        page.locator(".progress span", has_text="1 done").wait_for()
    with store.Store(path, read_only=True) as opened:
        [found] = opened.latest("a")
    assert found.judgement.comment == "why" and found.judgement.strength in (4, 5)
    assert found.judgement.seconds is not None and found.judgement.seconds > 1.5


def test_the_page_is_usable_by_tab_alone(browser, served):
    server, token, paths = served
    page = signed_in(browser, server, token)
    page.goto(server.url + paths[4])
    reached = []
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("(document.activeElement.name || document.activeElement.textContent).trim()"))
        if reached[-1].startswith("Submit"):
            break
    assert reached[0] == "Skip to the content" and "answer" in reached and reached[-1].startswith("Submit")
    page.keyboard.press("Enter")  # nothing is chosen yet
    page.get_by_text("Choose one first").wait_for()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("ArrowRight")
    assert page.locator("input[name=answer]:checked").count() == 1
