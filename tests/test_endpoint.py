"""An endpoint that is good, slow, busy, broken or choosy: what is sent to it, and what is made of its answers."""

import logging
import socket
import sys
import time

import pytest
from fake_endpoint import completion, dripping, serving

from ablate_shards.errors import EvaluateError, UsageError
from ablate_shards.surgery.evaluate import endpoint as station
from ablate_shards.surgery.evaluate.endpoint import ChatOptions, Reply, chat, open_endpoint

KEY = "KEY_FOR_THESE_TESTS"
SECRET = "sk-4711-do-not-show"


@pytest.fixture(autouse=True)
def without_key(monkeypatch):
    monkeypatch.delenv(KEY, raising=False)


def ask(fake, *prompts, timeout=5.0, attempts=3, notes=None, model="served", **options):
    replies = {}
    chat(
        open_endpoint(fake.url, model, key_variable=KEY, option="--model", timeout=timeout, attempts=attempts),
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        ChatOptions(**options),
        replies.__setitem__,
        [].append if notes is None else notes.append,
    )
    return replies


def test_many_questions_are_answered_some_at_a_time():
    def slowly(body, _):
        time.sleep(0.05)
        return completion("to " + body["messages"][0]["content"])

    with serving(slowly) as fake:
        replies = ask(fake, *map(str, range(9)), at_once=3)

    assert replies == {number: Reply(f"to {number}", ended=True) for number in range(9)}
    assert fake.busiest == 3


def test_what_is_sent_is_greedy_and_bounded():
    with serving(lambda *_: completion("yes")) as fake:
        ask(fake, "one", tokens=7)

    assert fake.bodies == [
        {
            "model": "served",
            "messages": [{"role": "user", "content": "one"}],
            "temperature": 0,
            "max_tokens": 7,
            "seed": 0,
            "chat_template_kwargs": {"enable_thinking": False},
        }
    ]
    assert "Authorization" not in fake.headers[0]


def test_the_key_is_sent_and_never_shown(monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv(KEY, f"{SECRET}\n")
    with serving(lambda *_: (401, {"error": {"message": f"no such key: {SECRET}"}})) as fake:
        with pytest.raises(EvaluateError, match=r"answered 401: no such key: \*\*\*; give a key") as refused:
            ask(fake, "one")
        shown = repr(open_endpoint(fake.url, "served", key_variable=KEY, option="--model", timeout=1))

    assert fake.headers[0]["Authorization"] == f"Bearer {SECRET}"
    assert len(fake.bodies) == 1
    assert SECRET not in str(refused.value) + shown + caplog.text


@pytest.mark.parametrize("key", ["two words", "schlüssel", "a\nb"])
def test_a_key_that_no_header_takes_is_not_repeated(monkeypatch, key):
    monkeypatch.setenv(KEY, key)
    with pytest.raises(UsageError, match=KEY) as refused:
        open_endpoint("http://localhost:1", "served", key_variable=KEY, option="--model", timeout=1)
    assert key not in str(refused.value)


def test_a_busy_endpoint_is_asked_again():
    answers = [(429, "slow down", {"Retry-After": "0.2"}), (500, "oops"), completion("at last")]
    with serving(lambda _, number: answers[number]) as fake:
        begun = time.monotonic()
        replies = ask(fake, "one")

    assert replies[0].text == "at last"
    assert time.monotonic() - begun >= 0.2
    assert len(fake.bodies) == 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_endpoint_that_stays_busy_is_given_up(status):
    with (
        serving(lambda *_: (status, {"error": {"message": "not\nnow"}})) as fake,
        pytest.raises(EvaluateError) as refused,
    ):
        ask(fake, "one")
    assert str(refused.value).startswith(f"{fake.url}: answered {status}: not now; see to the endpoint")
    assert len(fake.bodies) == 3


def test_an_endpoint_that_asks_for_an_hour_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(station, "_LONGEST_PAUSE", 0.05)
    answers = [(429, "", {"Retry-After": "3600"}), completion("yes")]
    with serving(lambda _, number: answers[number]) as fake:
        assert ask(fake, "one")[0].text == "yes"


@pytest.mark.parametrize("hang", [lambda *_: time.sleep(1), lambda *_: dripping()], ids=["silent", "dripping"])
def test_an_endpoint_that_hangs_is_given_up(hang):
    with serving(hang) as fake:
        begun = time.monotonic()
        with pytest.raises(EvaluateError, match=r"no answer within 0\.2 s"):
            ask(fake, "one", timeout=0.2, attempts=9)
        took = time.monotonic() - begun
    assert len(fake.bodies) == 2
    assert took < 3


def test_an_endpoint_that_is_not_there_is_said_so():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        endpoint = open_endpoint(url, "served", key_variable=KEY, option="--model", timeout=5, attempts=2)
        with pytest.raises(EvaluateError, match="cannot be reached"):
            chat(endpoint, [[]], ChatOptions(), lambda *_: None, lambda _: None)


@pytest.mark.parametrize(
    ("garbage", "said"),
    [
        ("<html>Welcome</html>", "expected JSON, found '<html>Welcome</html>'"),
        ("", "expected JSON, found 'nothing'"),
        ("[" * 9999, "expected JSON"),
        ([1, 2], "expected a JSON object"),
        ({"choices": []}, "expected a chat completion"),
        ({"choices": [{"text": "old"}]}, "expected a chat completion"),
        ({"choices": [{"message": None}]}, "expected a chat completion"),
        ({"choices": [{"message": {"content": 7}}]}, "expected the message as text, found int"),
        ({"error": {"message": "no such thing"}}, "no such thing"),
        (iter([b"x" * (1 << 20)] * 20), "expected JSON"),
        ((200, "no gzip", {"Content-Encoding": "gzip"}), "expected JSON, found broken compression"),
    ],
)
def test_garbage_is_said_to_be_garbage(garbage, said):
    with serving(lambda *_: garbage) as fake, pytest.raises(EvaluateError) as refused:
        ask(fake, "one")
    assert said in str(refused.value)
    assert len(str(refused.value)) < 400
    assert len(fake.bodies) == 1


def test_what_was_answered_before_is_heard():
    def second_fails(body, _):
        if body["messages"][0]["content"] == "2":
            time.sleep(0.2)
            return "garbage"
        return completion("yes")

    replies = {}
    with serving(second_fails) as fake, pytest.raises(EvaluateError):
        chat(
            open_endpoint(fake.url, "served", key_variable=KEY, option="--model", timeout=5),
            [[{"role": "user", "content": str(number)}] for number in range(4)],
            ChatOptions(),
            replies.__setitem__,
            lambda _: None,
        )
    assert sorted(replies) == [0, 1, 3]


def test_an_endpoint_that_takes_no_template_options_is_asked_without():
    def choosy(body, _):
        return (400, "unknown field") if "chat_template_kwargs" in body else completion("yes")

    notes = []
    with serving(choosy) as fake:
        replies = ask(fake, *"abcd", notes=notes, at_once=2)

    assert len(replies) == 4
    assert {frozenset(body) for body in fake.bodies[-2:]} == {
        frozenset(["model", "messages", "temperature", "max_tokens"])
    }
    assert len(notes) == 1
    assert "may think first" in notes[0]


def test_only_a_judge_may_be_asked_at_its_own_temperature():
    def choosier(body, _):
        return completion("yes") if "max_completion_tokens" in body else (400, "no temperature, please")

    with serving(choosier) as fake:
        assert ask(fake, "one", greedy=False)[0].text == "yes"
        with pytest.raises(EvaluateError, match="answered 400: no temperature, please"):
            ask(fake, "one")


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": None, "reasoning_content": "hm"}, "<think>hm</think>"),
        ({"content": "so", "reasoning": "hm"}, "<think>hm</think>so"),
        ({"content": None, "refusal": "no"}, "no"),
        ({"content": None}, ""),
        ({"content": "half \ud83d"}, "half ?"),
    ],
)
def test_every_form_of_message_is_read(message, text):
    with serving(lambda *_: {"choices": [{"message": message, "finish_reason": "length"}]}) as fake:
        assert ask(fake, "one")[0] == Reply(text, ended=False)


def test_the_only_model_is_found():
    with serving(lambda *_: completion("yes")) as fake:
        assert open_endpoint(fake.url, None, key_variable=KEY, option="--model", timeout=5).model == "served"
        for models, found in (([], "none"), ([{"id": "a"}, {"id": "b"}], "a, b"), ("x", "none"), ([{"id": 3}], "none")):
            fake.models = {"data": models}
            with pytest.raises(EvaluateError, match=f"expected one model, found {found}; name one with --model"):
                open_endpoint(fake.url, None, key_variable=KEY, option="--model", timeout=5)


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://localhost:8000/", "http://localhost:8000/v1"),
        ("https://example.org/api/v2/", "https://example.org/api/v2"),
        ("http://localhost:8000/v1/chat/completions", "http://localhost:8000/v1"),
    ],
)
def test_an_address_may_be_written_in_several_ways(url, base):
    assert open_endpoint(url, "served", key_variable=KEY, option="--model", timeout=1).url == base


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://localhost", "http://", "", f"http://me:{SECRET}@localhost", f"http://x/v1?key={SECRET}"],
)
def test_an_address_that_cannot_be_used_is_refused(url):
    with pytest.raises(UsageError) as refused:
        open_endpoint(url, "served", key_variable=KEY, option="--model", timeout=1)
    assert SECRET not in str(refused.value)


def test_without_httpx2_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(EvaluateError, match=r"which is not installed; `pip install 'ablate-shards\[lora\]'`"):
        open_endpoint("http://localhost:1", "served", key_variable=KEY, option="--model", timeout=1)
