"""A judge for the micro TwiFF-Bench that needs no model: rules behind an OpenAI-compatible endpoint on loopback.

    python scripts/micro_judge.py            # prints its base URL
    future-l1 judge OUTPUT_PATH --model micro-judge --base-url URL

It reads the prompt alone, as a model would. Answer: 5 if the answer to grade names the right option (by
`rewards.answer`), else 0. CoT: 5 times the share of the reference's seen cells ("2 bx") that the reasoning tells right.
"""

import argparse
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from future_l1_plugin.rewards.answer import option_letter

_BLOCK = re.compile(r"<(\w+)-(\w{12})>\n(.*?)\n</\1-\2>", re.DOTALL)
_SEEN = re.compile(r"\b(\d+) (hidden|[a-d][w-z])\b")


def judge(prompt: str) -> dict[str, float]:
    """{"cot": .., "answer": ..} for a prompt of `evaluation.twiffbench`."""
    blocks = {name: text for name, _, text in _BLOCK.findall(prompt)}
    options = dict(re.findall(r"^([A-D])\. (.+)$", blocks["question"], re.MULTILINE))
    right = next((letter for letter, text in options.items() if text == blocks["reference_answer"]), None)
    chosen = option_letter(f"<answer>{blocks['answer']}</answer>", options)
    seen = set(_SEEN.findall(blocks["reference_reasoning"]))
    told = dict(_SEEN.findall(blocks["reasoning"]))
    share = sum(told.get(second) == cell for second, cell in seen) / len(seen) if seen else 0.0
    return {"cot": round(5 * share, 2), "answer": 5.0 if right is not None and chosen == right else 0.0}


class Handler(BaseHTTPRequestHandler):
    """POST of a chat completion, whatever the path."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.reply(body)

    def reply(self, body: dict) -> None:
        content = body["messages"][-1]["content"]
        texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
        self.say(json.dumps(judge("".join(texts))))

    def say(self, text: str) -> None:
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        self.send(200, json.dumps({"object": "chat.completion", "choices": [choice]}))

    def send(self, status: int, body: str) -> None:
        data = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Nothing: a line a request would drown the terminal."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0, help="0 (default): any that is free")
    server = ThreadingHTTPServer(("127.0.0.1", parser.parse_args().port), Handler)
    print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
