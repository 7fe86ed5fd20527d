"""The client of endpoints, carrying a judge's prompts to a real HTTP server on loopback that fails in many ways."""

import asyncio
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from functools import partial

import pytest
from http_stand_in import HANG_S, no_key_no_proxy, serving
from judge_stand_in import (
    FAULTS,
    MALFORMED,
    JudgeServer,
    ask,
    drips,
    items,
    judge_all,
    judge_of,
    judged,
    marks,
    run,
    says,
    stalls,
    status,
)

from future_l1_plugin.endpoint.client import ChatClient, _retry_after
from future_l1_plugin.endpoint.errors import EndpointError, MalformedReply, NoReply
from future_l1_plugin.endpoint.settings import EndpointSettings
from future_l1_plugin.errors import ConfigError
from future_l1_plugin.rewards.judge import JudgeError, JudgeUnavailable, build_judge


@pytest.fixture
def server(monkeypatch):
    no_key_no_proxy(monkeypatch)
    with serving(JudgeServer()) as served:
        yield served


@pytest.fixture
def judge(server):
    """Makes judges of the server."""
    return partial(judge_of, server)


def test_where_the_key_comes_from(judge, server, tmp_path, monkeypatch):
    file = tmp_path / "key"
    file.write_text("from-file\n")
    ask(judge())
    monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
    ask(judge())
    ask(judge(api_key_file=str(file)))
    assert server.keys == ["Bearer none", "Bearer from-environment", "Bearer from-file"]
    assert "from-file" not in repr(vars(judge(api_key_file=str(file)).client.settings))


def test_a_missing_key_is_found_before_any_request(monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"api\.openai\.com wants a key.*api_key_file"):
        build_judge({"model": "m"})
    with pytest.raises(ConfigError, match=r"api_key_file: expected a text file .*absent"):
        build_judge({"model": "m", "api_key_file": str(tmp_path / "absent")})
    for text in ("", "two words"):
        (tmp_path / "key").write_text(text)
        with pytest.raises(ConfigError, match="expected one word") as raised:
            build_judge({"model": "m", "api_key_file": str(tmp_path / "key")})
        assert "two words" not in str(raised.value), "a message must not show what is in a key file"


# -- requests ----------------------------------------------------------------------------------------------------------


def test_verdicts_and_what_is_sent(judge, server):
    client = judge(max_tokens=77)
    assert (ask(client, "left"), ask(client, "right")) == (1.0, 0.0)
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.0, 77)
    assert "seed" not in body and len(body["messages"]) == 1
    assert len(server.bodies) == 2


def test_settings_of_null_are_not_sent(judge, server):
    ask(judge(temperature=None, max_tokens=None))
    assert server.bodies[0].keys() == {"model", "messages"}


@pytest.mark.parametrize("fault", FAULTS)
def test_passing_faults_are_retried(judge, server, fault):
    server.script.extend([FAULTS[fault]] * 2)
    assert ask(judge(), "right") == 0.0
    assert len(server.bodies) == 3
    # The same greedy prompt would bring the same malformed reply.
    assert (server.prompts[0] == server.prompts[1]) is (fault not in MALFORMED)
    assert server.prompts[1].startswith(server.prompts[0])


@pytest.mark.parametrize("fault", [stalls, drips])
def test_timeouts_cover_the_whole_reply(judge, server, fault):
    server.script.extend([fault, judged, fault, fault])
    client, start = judge(timeout_s=0.3, max_retries=1), time.perf_counter()
    assert ask(client) == 1.0
    with pytest.raises(JudgeError, match=r"no whole reply within timeout_s=0\.3"):
        ask(client)
    assert len(server.bodies) == 4 and time.perf_counter() - start >= 0.9


def test_a_server_that_is_down(judge, server):
    client = judge(max_retries=2)
    server.shutdown()
    server.server_close()
    with pytest.raises(JudgeError, match=r"after 3 requests: the connection failed \(.*Check that the server runs"):
        ask(client)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (400, "temperature or max_tokens"),
        (401, r"\(none was given\) is missing, wrong or expired.*api_key_file"),
        (402, "no credit"),
        (403, "may not use this model"),
        (404, "Check `model`, and the path of base_url"),
        (422, "Its own words say why"),
    ],
)
def test_refusals_are_not_retried(judge, server, code, words):
    server.script.append(status(code, "the server's words"))
    client = judge()
    with pytest.raises(JudgeError, match=words) as raised:
        ask(client)
    for part in (server.url, " m at ", "the server's words", f"HTTP {code}", "after 1 request:"):
        assert part in str(raised.value)
    assert len(server.bodies) == 1
    assert not isinstance(raised.value, JudgeUnavailable)


def test_an_empty_account_is_not_waited_for(judge, server):
    server.script.append(status(429, kind="insufficient_quota"))
    with pytest.raises(JudgeError, match="no credit"):
        ask(judge())
    assert len(server.bodies) == 1


# -- waits -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def waits(monkeypatch):
    """The waits that are asked of asyncio (s); none is waited."""
    asked, sleep = [], asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds, *rest: asked.append(seconds) or sleep(0, *rest))
    return asked


def test_the_wait_doubles_up_to_its_bound(judge, server, waits):
    server.script.extend([status(500)] * 6)
    ask(judge(backoff_s=1.0, max_backoff_s=10.0, max_retries=6))
    assert len(waits) == 6
    for wait, longest in zip(waits, [1, 2, 4, 8, 10, 10], strict=True):
        assert longest / 2 <= wait <= longest


def test_retry_after_is_honoured(judge, server, waits):
    late = formatdate(time.time() + 30, usegmt=True)
    asked = ["7", "0.2", late, "soon", "-3"]
    server.script.extend(
        status(code, Retry_After=value) for code, value in zip([429, 503, 429, 429, 500], asked, strict=True)
    )
    ask(judge(backoff_s=1.0, max_backoff_s=60.0, max_retries=5))
    assert 7 <= waits[0] <= 8
    assert 1 <= waits[1] <= 2, "never sooner than without it"
    assert 20 <= waits[2] <= 31
    assert 4 <= waits[3] <= 8 and 8 <= waits[4] <= 16


def test_a_server_that_asks_for_too_long_a_wait(judge, server, waits):
    server.script.append(status(429, Retry_After="3600"))
    with pytest.raises(JudgeUnavailable, match=r"asked again after 3600 s.*max_backoff_s"):
        ask(judge(on_failure="drop_group"))
    assert waits == [] and len(server.bodies) == 1


@pytest.mark.parametrize(
    ("value", "seconds"), [("5", 5.0), ("1.5", 1.5), ("-1", 0.0), ("nan", 0.0), ("", 0.0), ("Mon, 99", 0.0)]
)
def test_retry_after_values(value, seconds):
    assert _retry_after({"retry-after": value}) == seconds
    assert _retry_after({}) == 0.0
    assert _retry_after({"retry-after": formatdate(0, usegmt=True)}) == 0.0  # long past


def test_waits_leave_the_global_random_numbers_alone(judge, server):
    import random

    server.script.extend([status(500)] * 2)
    random.seed(0)
    expected = random.Random(0).random()
    ask(judge())
    assert random.random() == expected


# -- many at a time ----------------------------------------------------------------------------------------------------


def test_concurrency_is_bounded_and_used(judge, server):
    server.wait_for_peak = 4
    assert run(judge_all(judge(max_concurrency=4), items(30))) == marks(30)
    assert server.peak == 4


def test_a_wait_holds_no_slot(judge, server):
    server.script.append(status(429, Retry_After="0.05"))
    client = judge(max_concurrency=1)
    order = []

    async def one(sample_id):
        await client.judge("q", "left", "left", sample_id)
        order.append(sample_id)

    async def both():
        await asyncio.gather(one("first"), one("second"))

    run(both())
    assert order == ["second", "first"]


def test_several_event_loops_one_after_another_and_in_threads(judge, server):
    client = judge(max_concurrency=2)
    for _ in range(3):
        assert run(judge_all(client, items(6))) == marks(6)
        assert server.wait_until(lambda: server.connections == 0), "a loop left its connections open"
    results = []
    threads = [threading.Thread(target=lambda: results.append(run(judge_all(client, items(6))))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    assert results == [marks(6)] * 3
    assert len(server.bodies) == 36
    assert len(client.client._states) <= 3, "closed loops are let go"


def test_a_loop_that_lasts_keeps_its_connection_until_it_is_closed(judge, server):
    async def twice():
        async with judge() as client:
            await client.judge(*items(1)[0])
            await client.judge(*items(2)[1])
            assert server.connections == 1
        await asyncio.to_thread(server.wait_until, lambda: server.connections == 0)
        assert server.connections == 0
        assert await client.judge(*items(2)[1]) == 1.0, "closing is no end"

    run(twice())


def test_cancellation_leaves_nothing_behind(judge, server):
    server.script.extend([stalls] * 3)
    client = judge(max_concurrency=3)

    async def cancelled():
        task = asyncio.create_task(judge_all(client, items(12)))
        await asyncio.to_thread(server.wait_until, lambda: len(server.bodies) == 3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert await judge_all(client, items(12)) == marks(12), "every slot is free again"

    run(cancelled())
    assert len(server.bodies) == 15


def test_the_first_failure_stops_the_rest(judge, server):
    server.script.extend([status(401), stalls, stalls])

    async def failing():
        with pytest.raises(JudgeError, match="HTTP 401"):
            await judge_all(judge(max_concurrency=1), items(20))
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(failing())
    assert len(server.bodies) <= 2


# -- cache -------------------------------------------------------------------------------------------------------------


def test_the_cache_saves_requests_across_judges(judge, server, tmp_path):
    cache = str(tmp_path / "deep" / "cache.db")
    assert run(judge_all(judge(cache=cache), items(6))) == marks(6)
    assert run(judge_all(judge(cache=cache), items(6))) == marks(6)
    assert len(server.bodies) == 6


def test_what_the_cache_tells_apart(judge, server, tmp_path):
    cache = str(tmp_path / "cache.db")
    base = dict(cache=cache)
    ask(judge(**base))
    for other in (
        dict(model="n"),
        dict(temperature=0.5),
        dict(max_tokens=9),
        dict(prompt="{question}{reference}{answer}"),
    ):
        server.bodies.clear()
        ask(judge(**base | other))
        assert len(server.bodies) == 1, other
    for other in (dict(answer="right"), dict(reference="right"), dict(sample_id="s2")):
        server.bodies.clear()
        ask(judge(**base), **other)
        assert len(server.bodies) == 1, other
    server.bodies.clear()
    ask(judge(**base, timeout_s=5.0, max_retries=1, max_concurrency=1, on_failure="drop_group"))
    assert server.bodies == [], "how it is asked does not change the verdict"


def test_equal_prompts_at_a_time_are_one_request(judge, server, tmp_path):
    client = judge(cache=str(tmp_path / "cache.db"), max_concurrency=2)
    assert run(judge_all(client, items(2)[1:] * 8)) == [1.0] * 8
    assert len(server.bodies) == 1


def test_equal_prompts_at_a_time_share_a_failure(judge, server, tmp_path):
    server.script.extend([status(500)] * 2)
    client = judge(cache=str(tmp_path / "cache.db"), max_retries=1, on_failure="drop_group")
    results = run(judge_all(client, items(2)[1:] * 8))
    assert {type(result) for result in results} == {JudgeUnavailable} and {r.sample_id for r in results} == {"s1"}
    assert len(server.bodies) == 2
    assert ask(client) == 1.0, "a failure is not remembered"


def test_a_cached_reply_that_is_no_verdict_any_more_is_asked_for_anew(judge, server, tmp_path):
    cache = tmp_path / "cache.db"
    ask(judge(cache=str(cache)))
    with sqlite3.connect(cache) as connection:
        connection.execute("UPDATE replies SET reply = 'bananas'")
    assert ask(judge(cache=str(cache))) == 1.0
    assert len(server.bodies) == 2
    assert ask(judge(cache=str(cache))) == 1.0
    assert len(server.bodies) == 2


WORKER = """
import asyncio, sys
from future_l1_plugin.rewards.judge import build_judge
url, cache, first = sys.argv[1:]
judge = build_judge({"base_url": url, "model": "m", "cache": cache, "max_concurrency": 8})
async def all_at_once(numbers):
    items = [(f"question {n}", "left", "left" if n % 3 else "right", f"s{n}") for n in numbers]
    return await asyncio.gather(*(judge.judge(*item) for item in items))
numbers = range(int(first), int(first) + 30)
print(asyncio.run(all_at_once(numbers)) == [1.0 if n % 3 else 0.0 for n in numbers])
"""


def test_processes_share_the_cache(judge, server, tmp_path):
    cache = str(tmp_path / "cache.db")
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, server.url, cache, str(first)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for first in (0, 10)
    ]
    done = [process.communicate(timeout=60) for process in started]
    assert [out for out, _ in done] == ["True\n"] * 2, done
    asked = len(server.bodies)
    assert 40 <= asked <= 60
    assert run(judge_all(judge(cache=cache), items(40))) == marks(40)
    assert len(server.bodies) == asked


@pytest.mark.parametrize(
    "content", [b"no database at all, but long enough to look at" * 10, b"SQLite format 3\0" * 100]
)
def test_a_broken_cache_names_the_file_and_the_fix(judge, server, tmp_path, content):
    cache = tmp_path / "cache.db"
    cache.write_bytes(content)
    with pytest.raises(EndpointError, match=r"expected a cache of replies.*Move it away") as raised:
        judge(cache=str(cache), on_failure="drop_group")
    assert str(cache) in str(raised.value)
    assert cache.read_bytes() == content


def test_a_cache_that_breaks_on_the_way_stops_the_run(judge, server, tmp_path):
    cache = tmp_path / "cache.db"
    client = judge(cache=str(cache), on_failure="drop_group")
    cache.write_bytes(b"overwritten" * 1000)
    with pytest.raises(JudgeError, match="Move it away") as raised:
        ask(client)
    assert not isinstance(raised.value, JudgeUnavailable)


def test_a_cache_that_cannot_be_opened(judge, server, tmp_path, monkeypatch):
    with pytest.raises(EndpointError, match=r"cannot be used.*set `cache` to another path"):
        judge(cache=str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(EndpointError, match=r"the folder of .* cannot be made"):
        judge(cache=str(tmp_path / "file" / "cache.db"))
    monkeypatch.setattr("future_l1_plugin.endpoint.cache.CACHE_BUSY_S", 0.05)
    cache = tmp_path / "cache.db"
    client = judge(cache=str(cache))
    holder = sqlite3.connect(cache, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(JudgeError, match="locked"):
        ask(client)
    holder.execute("ROLLBACK")
    assert ask(client) == 1.0


# -- other prompts -----------------------------------------------------------------------------------------------------


def test_the_transport_serves_other_prompts_and_marks(server, tmp_path):
    def read_mark(reply: str) -> int:
        if not re.fullmatch("[0-5]", reply):
            raise MalformedReply(f"expected a mark from 0 to 5, found {reply!r}")
        return int(reply)

    server.script.extend([says("9"), says("4")])
    client = ChatClient(
        EndpointSettings(base_url=server.url, model="m", backoff_s=0.01, cache=str(tmp_path / "cache.db"))
    )
    parts = [
        {"type": "text", "text": "Mark this."},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}},
    ]
    assert run(client.ask(parts, read_mark, "s1", reminder="A digit.")) == 4
    assert run(client.ask(parts, read_mark, "s1", reminder="A digit.")) == 4
    assert server.prompts == [parts, [*parts, {"type": "text", "text": "A digit."}]]


def test_a_seed_is_sent_and_told_apart_in_the_cache(server, tmp_path):
    server.script.extend([says("one"), says("two")])
    client = ChatClient(EndpointSettings(base_url=server.url, model="m", cache=str(tmp_path / "cache.db")))
    replies = [run(client.ask("Say.", str, "s1", seed=seed)) for seed in (1, 2, 1)]
    assert replies == ["one", "two", "one"]
    assert [body["seed"] for body in server.bodies] == [1, 2]


def test_a_reply_that_was_cut_off_is_read_only_where_that_is_wanted(server):
    server.script.extend([says("The ball rol", finish="length")] * 2)
    client = ChatClient(EndpointSettings(base_url=server.url, model="m", backoff_s=0.01, max_retries=0))
    assert run(client.ask("Say.", str, "s1", cut_off=True)) == "The ball rol"
    with pytest.raises(NoReply, match="cut off by max_tokens"):
        run(client.ask("Say.", str, "s1"))


def test_importing_loads_neither_torch_nor_the_client():
    code = "import sys, future_l1_plugin.rewards.judge; sys.exit(bool({'torch', 'openai'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
