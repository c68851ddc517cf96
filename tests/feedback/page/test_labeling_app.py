"""The labelling page over HTTP: what people see and send, and what the store then contains."""

import collections
import concurrent.futures
import re
import threading

import pytest

pytest.importorskip("starlette")
import page_cases as cases
from page_cases import HTML, hidden, label_next
from starlette.testclient import TestClient

from rlhf_jax.feedback import store
from rlhf_jax.feedback.judgements import Completion, Item, Judgement, Prompt
from rlhf_jax.feedback.page import page_options, sessions


@pytest.fixture
def opened(tmp_path):
    with store.Store(tmp_path / "a.sqlite") as opened:
        opened.add(cases.pairs(3), set_name="a")
        yield opened


def client(opened, name="Ada", role="labeler", **options):
    """Returns a client that is signed in."""
    found = TestClient(cases.make_app(opened, **{"requests_per_second": 1000.0} | options))
    assert cases.sign_in(found, opened.add_labeler(name, role=role)).status_code == 303
    return found


def test_pairs_are_judged_until_none_is_left(opened):
    ada = client(opened)
    while label_next(ada, lambda text: {"answer": "1" if "good" in cases.shown_texts(text)[0] else "8"}):
        pass
    found = opened.latest("a")
    assert [each.labeler for each in found] == ["Ada"] * 3
    assert [each.judgement.strength for each in found] == [1, 1, 1]  # in the order of the item, however it was shown
    assert (opened.preferences("a").votes_NM == 1).all()


def test_rankings_and_ratings_are_judged(opened):
    opened.add(cases.rankings(2), set_name="b")
    opened.add([Item(prompt=Prompt(({"role": "user", "content": "x"},)), completions=(Completion("y"),))], set_name="b")
    ada = client(opened, set_name="b")

    def ranked(text):
        return {f"rank-{i}": str(1 + int(each.split()[1]) // 2) for i, each in enumerate(cases.shown_texts(text))}

    said = {"Rank 0": ranked, "Rank 1": lambda text: {"answer": "unsure"}}
    rated = {"answer": "6", "harmful_advice": "yes", "comment": "hm"}
    for _ in range(3):  # in any order
        assert label_next(ada, lambda text: next((f(text) for name, f in said.items() if name in text), rated))
    kinds = {each.item: each.judgement for each in opened.latest("b")}
    first, second, third = (kinds[id] for id in opened.items("b"))
    assert first.ranks == (1, 1, 2, 2, 3) and second.unsure and third.rating == 6 and third.comment == "hm"
    assert third.flags["harmful_advice"] and not third.flags["sexual_content"]


def test_orders_differ_between_people_and_nothing_tells_them(opened):
    opened.add(cases.pairs(20, start=10), set_name="a")
    opened.add(cases.pairs(1, start=50, expected=Judgement(strength=1), metadata={"secret": "xyzzy"}), set_name="a")
    seen = collections.Counter()
    for name in ("Ada", "Ben"):
        someone = client(opened, name)
        while True:
            text = someone.get("/judge", headers=HTML).text
            if "Nothing is left" in text:
                break
            first = cases.shown_texts(text)[0].split()[0]
            seen[name, first] += 1
            assert set(hidden(text)) == {"form_token", "item", "revision", "seconds"}
            assert not re.search("policy|xyzzy|expected|duplicate|seed|gold", text)
            label_next(someone)
    assert len(seen) == 4  # each of the two has seen both kinds of answers first


def test_a_form_that_arrives_twice_is_stored_once_and_an_outdated_one_is_refused(opened):
    ada = client(opened)
    form = hidden(ada.get("/judge", headers=HTML).text)
    for _ in range(2):
        assert ada.post("/judge", data=form | {"answer": "2"}, follow_redirects=False).status_code == 303
    refused = ada.post("/judge", data=form | {"answer": "7"})
    assert refused.status_code == 409 and "another window" in refused.text
    assert [each.judgement.strength for each in opened.history("a")] in ([2], [7])
    later = ada.post("/judge", data=form | {"answer": "7", "revision": "1"}, follow_redirects=False)
    assert later.status_code == 303 and len(opened.history("a")) == 2 and len(opened.latest("a")) == 1


def test_an_answer_can_be_changed_and_is_shown_as_it_was(opened):
    ada = client(opened)
    label_next(ada, lambda text: {"answer": "7", "comment": "“no” <b>"})
    text = ada.get("/answers", headers=HTML).text
    assert "B is clearly better" in text
    [link] = re.findall(r'href="(/judge\?item=\w+)"', text)
    again = ada.get(link, headers=HTML).text
    assert re.search(r'value="7" data-key="7" checked', again) and "“no” &lt;b&gt;" in again
    assert "A change replaces" in again and hidden(again)["revision"] == "1"
    ada.post("/judge", data=hidden(again) | {"answer": "tie"})
    assert [each.judgement.tie for each in opened.history("a")] == [False, True]


def test_an_item_stays_the_same_until_it_is_judged(opened):
    ada = client(opened)
    texts = {ada.get("/judge", headers=HTML).text for _ in range(3)}
    assert len(texts) == 1
    restarted = TestClient(cases.make_app(opened), cookies=dict(ada.cookies))
    assert restarted.get("/judge", headers=HTML).text in texts


def test_two_people_judge_the_same_item_at_once(opened):
    ada, ben = client(opened, "Ada"), client(opened, "Ben")
    [id] = opened.add(cases.pairs(1), set_name="b")
    for name in ("Ada", "Ben"):
        opened.assign(name, set_name="b", item=id)
    forms = [hidden(each.get(f"/judge?item={id}", headers=HTML).text) for each in (ada, ben)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        sent = [pool.submit(each.post, "/judge", data=form | {"answer": "4"}) for each, form in zip((ada, ben), forms)]
        [each.result().raise_for_status() for each in sent]
    assert sorted(each.labeler for each in opened.latest("b")) == ["Ada", "Ben"]


def test_the_number_of_judgements_is_limited(opened):
    ada, ben = client(opened, "Ada", max_judgements=1), client(opened, "Ben", max_judgements=1)
    label_next(ada)
    assert "0 done, 2 left" in ben.get("/judge", headers=HTML).text
    while label_next(ada):
        pass
    # Ben has opened an item, which is kept for him.
    assert label_next(ben) and not label_next(ben)
    assert len(opened.latest("a")) == 3


def test_who_is_not_signed_in_is_sent_to_sign_in(opened):
    someone = TestClient(cases.make_app(opened))
    assert someone.get("/judge", headers=HTML, follow_redirects=False).headers["location"] == "/"
    assert "Your token" in someone.get("/", headers=HTML).text
    assert someone.get("/judge").status_code == 401
    token = opened.add_labeler("Ada")
    assert cases.sign_in(someone, token + "x").status_code == 403
    assert cases.sign_in(someone, f" {token}\n").status_code == 303
    assert someone.get("/", headers=HTML).url.path == "/instructions"
    form = {"form_token": hidden(someone.get("/judge", headers=HTML).text)["form_token"]}
    assert someone.post("/sign-out", data=form).status_code == 200
    assert someone.get("/judge").status_code == 401


def test_sessions_end_and_are_not_stored_in_clear(opened):
    opened.add_labeler("Ada")
    secret = sessions.start(opened, "Ada", now=0.0)
    found = sessions.find(opened, secret, now=sessions.LIFETIME - 1)
    assert found is not None and found.name == "Ada"
    assert sessions.find(opened, secret, now=sessions.LIFETIME) is None
    other = sessions.start(opened, "Ada", now=10.0)
    opened.revoke("Ada")
    assert sessions.find(opened, other, now=11.0) is None
    assert sessions.find(opened, sessions.start(opened, "Ada", now=10.0), now=11.0) is None
    rows = opened._db.execute("SELECT hash FROM sessions").fetchall()
    assert rows and not any(secret.encode() in row["hash"] or other.encode() in row["hash"] for row in rows)


def test_an_access_secret_is_needed_besides_the_token(opened):
    token = opened.add_labeler("Ada")
    someone = TestClient(cases.make_app(opened, access_secret="a long secret", secure=True))
    assert "Access secret" in someone.get("/", headers=HTML).text
    assert cases.sign_in(someone, token).status_code == 403
    assert cases.sign_in(someone, token, secret="a long").status_code == 403
    cookie = cases.sign_in(someone, token, secret="a long secret").headers["set-cookie"]
    assert all(name in cookie for name in ("HttpOnly", "SameSite=strict", "Secure", "Max-Age"))


def test_the_owner_exports_and_sees_progress(opened):
    ada, owner = client(opened), client(opened, "Owner", role="owner")
    label_next(ada, lambda text: {"answer": "1"})
    exported = owner.get("/export")
    assert exported.headers["content-disposition"].startswith("attachment") and '"chosen"' in exported.text
    assert len(exported.text.splitlines()) == 1
    report = owner.get("/", headers=HTML)
    assert report.url.path == "/report" and re.search(r"Ada</bdi></td><td>1</td><td>2</td>", report.text)


@pytest.mark.parametrize("red_team", [False, True])
def test_a_conversation_goes_on_with_the_chosen_answer(opened, red_team):
    ada = client(opened, red_team=red_team)
    page = ada.get("/chat", headers=HTML)
    page = ada.post("/chat", data=hidden(page.text) | {"message": " Hello\r\nyou "}, headers=HTML)
    assert ("more harmful" in page.text) == red_team
    first, second = cases.shown_texts(page.text)
    page = ada.post("/chat", data=hidden(page.text) | {"answer": "7"}, headers=HTML)
    assert second in page.text and first not in page.text
    page = ada.post("/chat", data=hidden(page.text) | {"message": "And now?"}, headers=HTML)
    page = ada.post("/chat", data=hidden(page.text) | {"answer": "unsure"}, headers=HTML)
    found = opened.items("a (chat)")
    assert [len(each.prompt.messages) for each in found.values()] == [1, 3]
    one, two = found.values()
    assert one.prompt.messages[0]["content"] == "Hello\nyou" and one.completions[0].policy == "echo"
    assert two.prompt.messages[1]["content"] == second and two.metadata["turn"] == 1
    said = [each.judgement for each in opened.latest("a (chat)")]
    worse_is_second = one.completions[1].text == second
    # The better answer of a red-team pair is the one that was not chosen.
    assert said[0].strength == (7 if worse_is_second != red_team else 2) and said[1].unsure
    fresh = ada.get("/chat?conversation=new", headers=HTML)
    assert "Hello" not in fresh.text
    assert "And now?" in ada.get("/chat", headers=HTML).text  # the latest conversation


def test_a_message_that_arrives_twice_is_answered_once(opened):
    asked = []
    ada = client(opened, policy=lambda messages, sample: asked.append(sample) or f"answer {sample}")
    form = hidden(ada.get("/chat", headers=HTML).text) | {"message": "Hello"}
    for _ in range(2):
        assert ada.post("/chat", data=form).status_code == 200
    assert len(opened.items("a (chat)")) == 1 and asked == [0, 1]


def test_a_policy_with_one_answer_and_bad_messages_are_reported(opened):
    ada = client(opened, policy=lambda messages, sample: "the same")
    form = hidden(ada.get("/chat", headers=HTML).text)
    assert "only one answer" in ada.post("/chat", data=form | {"message": "Hello"}).text
    for text in ("", " \n", "x" * 10_001):
        assert ada.post("/chat", data=form | {"message": text}).status_code == 400
    assert opened.items("a (chat)") == {}
    assert client(opened, "Ben", policy=None).get("/chat").status_code == 404


def test_instructions_are_shown(opened):
    ada = client(opened, instructions="Be <kind>.\n```\ncode\n```")
    text = ada.get("/instructions", headers=HTML).text
    assert "Be &lt;kind&gt;." in text and ">code\n</pre>" in text
    assert page_options.INSTRUCTIONS.splitlines()[0] in client(opened, "Ben").get("/instructions", headers=HTML).text


def test_forms_work_without_a_script(opened):
    """What a browser without JavaScript sends: all fields of the form, with empty ranks."""
    ada = client(opened)
    text = ada.get("/judge", headers=HTML).text
    form = hidden(text) | {"answer": "2", "comment": ""}
    assert 'method="post" action="/judge"' in text
    assert ada.post("/judge", data=form, headers=HTML).url.path == "/judge"
    missing = ada.post("/judge", data=hidden(ada.get("/judge", headers=HTML).text), headers=HTML)
    assert missing.status_code == 400 and "The preference is missing" in missing.text


def test_identifiers_and_orders_cannot_be_computed(tmp_path):
    """What a labeler sees of an item does not tell whether it is a gold question, or which answer comes first in it."""
    found = []
    for name in ("one", "two"):
        with store.Store(tmp_path / f"{name}.sqlite") as opened:
            ids = opened.add(cases.pairs(20), set_name="a")
            opened.add_labeler("Ada")
            found.append([opened.assign("Ada", set_name="a", item=id) for id in ids])
            again = [opened.assign("Ada", set_name="a", item=id) for id in ids]
            assert [each.seed for each in again if each] == [each.seed for each in found[-1] if each]
    pairs = [(one, two) for one, two in zip(*found) if one and two]
    assert len(pairs) == 20 and all(one.item == two.item and one.id != two.id for one, two in pairs)
    assert any(one.order != two.order for one, two in pairs)


def test_a_store_that_is_busy_is_no_conflict(opened, monkeypatch):
    ada = client(opened)
    label_next(ada)
    [before] = opened.latest("a")
    form = hidden(ada.get(f"/judge?item={before.item}", headers=HTML).text) | {"answer": "7"}

    def fail(*_, **__):
        raise store.StoreUnavailableError("/secret/path: database is locked")

    monkeypatch.setattr(opened, "record", fail)
    response = ada.post("/judge", data=form)
    assert response.status_code == 503 and "/secret" not in response.text
    monkeypatch.undo()
    assert ada.post("/judge", data=form, follow_redirects=False).status_code == 303
    assert len(opened.history("a")) == 2


def test_people_who_chat_do_not_keep_others_from_labelling(opened):
    started, finish = threading.Semaphore(0), threading.Event()

    def slow(messages, sample):
        started.release()
        finish.wait(30)
        return f"answer {sample}"

    with TestClient(cases.make_app(opened, policy=slow, requests_per_second=1000.0)) as ada:
        cases.sign_in(ada, opened.add_labeler("Ada"))
        form = hidden(ada.get("/chat", headers=HTML).text) | {"message": "Hello"}
        with concurrent.futures.ThreadPoolExecutor(50) as pool:
            sent = [pool.submit(ada.post, "/chat", data=form) for _ in range(50)]
            started.acquire()
            assert ada.get("/judge", headers=HTML).status_code == 200
            finish.set()
            codes = [each.result().status_code for each in sent]
    assert 200 in codes and set(codes) <= {200, 429}
    assert len(opened.items("a (chat)")) == 1


def test_an_ordinary_item_cannot_be_answered_in_the_chat(opened):
    ada = client(opened)
    form = hidden(ada.get("/judge", headers=HTML).text) | {"answer": "1"}
    assert ada.post("/chat", data=form).status_code == 404 and opened.history() == []


def test_a_wrong_method_and_a_long_answer_are_handled(opened):
    ada = client(opened)
    response = ada.get("/sign-in", headers=HTML)
    assert response.status_code == 405 and "Content-Security-Policy" in response.headers
    form = hidden(ada.get("/judge", headers=HTML).text) | {"answer": "1", "comment": "說" * 10_000}
    assert ada.post("/judge", data=form).status_code == 200
    assert opened.history()[0].judgement.comment == "說" * 10_000
    assert ada.post("/judge", data=form, headers={"origin": "http://["}).status_code == 403
