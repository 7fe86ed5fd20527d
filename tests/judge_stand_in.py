"""A judge behind a real HTTP server that answers, stalls, refuses, lies and hangs up, as a test's script says."""

import asyncio
import json
import re
import threading
import time
from collections import deque
from typing import Any

from http_stand_in import HANG_S, Handler, StandIn

from future_l1_plugin.rewards.judge import Judge, JudgeItem, JudgeUnavailable, build_judge


class JudgeServer(StandIn):
    """Does to each request what stands next in `script`, and judges properly when that is empty."""

    def __init__(self):
        self.script = deque()
        self.bodies, self.keys = [], []
        self.active = self.peak = self.connections = 0
        self.wait_for_peak = 0
        self.change = threading.Condition()
        super().__init__(JudgeHandler)

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.bodies]

    def wait_until(self, condition) -> bool:
        with self.change:
            return self.change.wait_for(condition, HANG_S)


class JudgeHandler(Handler):
    def count(self, name: str, by: int) -> None:
        with self.server.change:
            setattr(self.server, name, getattr(self.server, name) + by)
            self.server.peak = max(self.server.peak, self.server.active)
            self.server.change.notify_all()

    def handle(self):
        self.count("connections", 1)
        try:
            super().handle()
        finally:
            self.count("connections", -1)

    def do_POST(self):
        body = self.body()
        with self.server.change:
            self.server.bodies.append(body)
            self.server.keys.append(self.headers["Authorization"])
            act = self.server.script.popleft() if self.server.script else judged
        self.count("active", 1)
        if self.server.wait_for_peak:
            self.server.wait_until(lambda: self.server.peak >= self.server.wait_for_peak)
            time.sleep(0.01)  # one request too many would show now
        self.count("active", -1)  # before the reply, at which the client may send its next request
        act(self, body)


def says(text, finish: str = "stop"):
    """The judge's reply is `text`."""
    return lambda handler, body: handler.say(text, finish)


def judged(handler, body):
    """The honest judge: correct if answer and reference are the same text."""
    prompt = body["messages"][0]["content"]
    reference, answer = (
        re.search(rf"<{tag}-\w+>\n(.*?)\n</{tag}-", prompt, re.DOTALL)[1] for tag in ("reference", "answer")
    )
    says(json.dumps({"correct": reference == answer}))(handler, body)


def status(code: int, error: str = "no", kind: str | None = None, **headers: str):
    text = json.dumps({"error": {"message": error, "type": "t", "code": kind}})
    return lambda handler, body: handler.send(code, text, **headers)


def raw(text: str):
    return lambda handler, body: handler.send(200, text)


def stalls(handler, body):
    """No reply until the test is over."""
    handler.server.released.wait(HANG_S)
    handler.close_connection = True


def drips(handler, body):
    """A reply that comes byte by byte and never ends."""
    handler.send(200, "{", length=10**6)
    while not handler.server.released.wait(0.02):
        handler.wfile.write(b" ")
    handler.close_connection = True


def hangs_up(handler, body):
    handler.close_connection = True


def hangs_up_within(handler, body):
    """Less of the body than its length says."""
    handler.send(200, '{"choices": [', length=500)
    handler.close_connection = True


#: What passes, and is tried again.
FAULTS = {
    "429": status(429),
    "500": status(500),
    "503": status(503),
    "408": status(408),
    "hangs up": hangs_up,
    "hangs up within": hangs_up_within,
    "nonsense": says("bananas"),
    "empty": says(""),
    "null": says(None),
    "truncated JSON": says('{"correct": tr'),
    "out of range": says('{"correct": 7}'),
    "conflicting": says('{"correct": true} {"correct": false}'),
    "cut off by max_tokens": says('{"correct": true} because', finish="length"),
    "body is no JSON": raw("<html>busy</html>"),
    "body is cut": raw('{"choices": [{"mess'),
    "body is an error": raw('{"error": {"message": "overloaded"}}'),
    "no choices": raw('{"choices": []}'),
}
#: Those that are a reply, but no verdict.
MALFORMED = list(FAULTS)[6:]


def judge_of(server: JudgeServer, **settings: Any) -> Judge:
    """A judge of the server, with waits that suit a test."""
    quick = dict(base_url=server.url, model="m", timeout_s=10.0, backoff_s=0.01, max_backoff_s=0.5, max_retries=3)
    return build_judge(quick | settings)


def ask(judge, answer="left", reference="left", sample_id="s1") -> float:
    return run(judge.judge("Where does the ball go?", reference, answer, sample_id))


def run(coroutine):
    async def bounded():
        async with asyncio.timeout(HANG_S):
            return await coroutine

    return asyncio.run(bounded())


def items(count: int) -> list[JudgeItem]:
    """Every third one is wrong."""
    return [JudgeItem(f"question {n}", "left", "left" if n % 3 else "right", f"s{n}") for n in range(count)]


def marks(count: int) -> list[float]:
    return [1.0 if n % 3 else 0.0 for n in range(count)]


async def judge_all(judge, items: list[JudgeItem]) -> list[float | JudgeUnavailable]:
    """All at once, as hosts ask: an item without a verdict has its JudgeUnavailable, another failure ends the rest."""

    async def one(item):
        try:
            return await judge.judge(*item)
        except JudgeUnavailable as error:
            return error

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(item)) for item in items]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]
