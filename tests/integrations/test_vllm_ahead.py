"""What `VllmEngine` reads, queues and hands out, and when: against an engine that only counts. Needs no vLLM."""

import gc
import threading
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from future_l1_plugin.errors import ConfigError, DataError
from future_l1_plugin.integrations.vllm import read_config
from future_l1_plugin.integrations.vllm.ahead import Ahead
from future_l1_plugin.integrations.vllm.engine import READ_AHEAD, WAITING, VllmEngine
from future_l1_plugin.model.engine import Decoding, Request, named

# ---- reading ahead --------------------------------------------------------------------------------------------------


def test_results_come_in_order_and_no_more_than_the_limit_are_begun():
    begun, most = [], []

    def work(item):
        begun.append(item)
        time.sleep(0.02 if item % 3 == 0 else 0)  # later items are done before
        return item * 10

    taken = []
    with Ahead(range(40), work, limit=5, threads=4) as ahead:
        for result in ahead:
            taken.append(result)
            most.append(len(begun) - len(taken))
    assert taken == [10 * i for i in range(40)]
    assert max(most) <= 5


def test_ready_tells_whether_one_would_wait():
    gate = threading.Event()
    with Ahead([1], lambda item: gate.wait(10), limit=4) as ahead:
        assert not ahead.ready
        gate.set()
        assert next(ahead) and ahead.ready
        with pytest.raises(StopIteration):
            next(ahead)


def test_an_error_comes_in_its_turn_and_leaving_begins_nothing_more():
    begun = []

    def work(item):
        begun.append(item)
        time.sleep(0.01)
        if item == 2:
            raise DataError("broken")
        return item

    taken = []
    with pytest.raises(DataError, match="broken"), Ahead(range(1000), work, limit=8, threads=2) as ahead:
        taken.extend(ahead)
    assert taken == [0, 1]
    left = len(begun)
    time.sleep(0.1)
    assert len(begun) == left <= 12


def test_one_processor_serves_all_threads(tiny_path):
    """Texts and pictures of many sizes, by eight threads at once: the same ids and pixels as one after the other."""
    from future_l1_plugin.model import LatentConfig
    from future_l1_plugin.model.checkpoint import load_processor

    processor = load_processor(tiny_path, LatentConfig.from_hf(read_config(str(tiny_path))))

    def encode(i):
        picture = np.random.default_rng(i).integers(0, 255, (64 + 32 * (i % 3), 64 + 32 * (i % 4), 3), dtype=np.uint8)
        content = [{"type": "image"}, {"type": "text", "text": "Where will it be? " * (1 + i % 5)}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return processor(text=[text], images=[picture], return_tensors="pt")

    with Ahead(range(48), encode, limit=24, threads=8) as ahead:
        together = list(ahead)
    for i, found in enumerate(together):
        wanted = encode(i)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted) and set(found) == set(wanted)


# ---- the engine -----------------------------------------------------------------------------------------------------


class Counting:
    """An `LLMEngine` with room for 1,024 requests: so many tokens to each, so many new requests a step."""

    def __init__(self, tokens=3, new=1024):
        self.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=1024))
        self.output_processor = SimpleNamespace(request_states={})
        self.tokens, self.new = tokens, new
        self.left, self.added, self.waited, self.aborted = {}, [], [], []

    def add_request(self, number, prompt, params):
        self.output_processor.request_states[f"{number}-0"] = SimpleNamespace(is_prefilling=True)
        self.left[number] = self.tokens
        self.added.append((number, prompt))
        self.waited.append(sum(s.is_prefilling for s in self.output_processor.request_states.values()))
        return f"{number}-0"

    def step(self):
        time.sleep(0.001)
        done, states, new = [], self.output_processor.request_states, self.new
        for number in list(self.left):
            if states[f"{number}-0"].is_prefilling:
                if not new:
                    break
                new, states[f"{number}-0"].is_prefilling = new - 1, False
            self.left[number] -= 1
            finished = not self.left[number]
            if finished:
                del self.left[number], states[f"{number}-0"]
            answer = SimpleNamespace(finish_reason="stop", token_ids=[7, int(number)])
            done.append(SimpleNamespace(request_id=number, finished=finished, outputs=[answer]))
        return done

    def abort_request(self, numbers):
        self.aborted += numbers


@pytest.fixture
def start(monkeypatch):
    """An engine around `Counting`; a request is its prompt alone."""
    monkeypatch.setattr(VllmEngine, "_request", lambda self, asked, inputs, hashes: ((asked.key, inputs, hashes), None))

    def start(**how):
        counting = Counting(**how)
        engine = VllmEngine.__new__(VllmEngine)
        model = SimpleNamespace(dtype=torch.bfloat16, max_model_len=100)
        engine._llm = SimpleNamespace(llm_engine=counting, model_config=model)
        engine._latent_id, engine._numbers = None, iter(range(10**6))
        engine._tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: str(ids))
        return engine, counting

    return start


PROMPT = torch.tensor([[1, 2]])


def ask(item, inputs=None):
    inputs = {"input_ids": PROMPT} if inputs is None else inputs
    return Request(item, inputs, Decoding(max_new_tokens=5), seed=item, name=f"prompt {item}")


def test_first_answers_come_before_many_prompts_were_read(start):
    """1,024 fit, and each takes 20 ms to read: the first answers need a few, not 2,048 of them."""
    engine, counting = start()
    read, found = [], []

    def encode(item):
        time.sleep(0.02)
        read.append(item)
        return [ask(item)]

    for answers in engine.answers(range(300), encode):
        if not found:
            assert len(read) <= 64
        found += [key for key, _ in answers]
        if len(found) > 20:
            break
    assert len(read) <= len(found) + 64
    assert len(counting.aborted) == len(counting.added) - len(found)


def test_few_wait_however_fast_they_are_read(start):
    """All are read at once, and vLLM begins one a step: what is read and has no token yet is bounded."""
    engine, counting = start(new=1)
    read, most = [], []

    def encode(item):
        read.append(item)
        most.append(len(read) - len(counting.added))
        return [ask(item)]

    found = [key for answers in engine.answers(range(400), encode) for key, _ in answers]
    assert sorted(found) == list(range(400))
    assert [prompt[0] for _, prompt in counting.added] == list(range(400))  # in the order of the items
    assert max(counting.waited) == WAITING and max(most) <= READ_AHEAD and WAITING + READ_AHEAD == 64
    assert len(counting.left) == 0 and counting.aborted == []


def test_vllm_decodes_while_a_video_is_read(start):
    """The second prompt is read only once the first has its answer: whoever waits for it would wait for ever."""
    engine, _ = start()
    answered = threading.Event()

    def encode(item):
        assert item == 0 or answered.wait(10), "the first answer did not come"
        return [ask(item)]

    found = []
    for answers in engine.answers(range(3), encode):
        found += [key for key, _ in answers]
        answered.set()
    assert found == [0, 1, 2]


def test_what_is_under_way_is_answered_before_an_error_is_raised(start):
    engine, counting = start(tokens=30)

    def encode(item):
        with named(f"clip {item}"):
            if item == 5:
                raise OSError("moov atom not found")
        return [ask(item)]

    found = []
    with pytest.raises(OSError, match="moov atom") as caught:
        for answers in engine.answers(range(1000), encode):
            found += [key for key, _ in answers]
    assert found == [0, 1, 2, 3, 4]
    assert caught.value.__notes__ == ["while the prompt clip 5 was encoded"]
    assert counting.aborted == []


def test_a_prompt_that_gives_nothing_is_passed_over(start):
    engine, _ = start()
    found = [key for answers in engine.answers(range(40), lambda item: [ask(item)] * (item % 4)) for key, _ in answers]
    assert sorted(found) == sorted(item for item in range(40) for _ in range(item % 4))


def test_pixels_are_cast_and_named_once_and_let_go_when_vllm_has_them(start, monkeypatch):
    from future_l1_plugin.integrations.vllm import media

    times, name = [], media._name
    monkeypatch.setattr(media, "_name", lambda *item: times.append(1) or name(*item))
    engine, counting = start()
    given = []

    def encode(item):
        inputs = {"pixel_values": torch.full((4, 6), item / 3), "image_grid_thw": torch.tensor([[1, 2, 2]])}
        inputs["input_ids"] = PROMPT
        given.append(weakref.ref(inputs["pixel_values"]))
        return [ask(item, inputs) for _ in range(3)]

    add, queued = counting.add_request, {}

    def add_request(number, prompt, params):
        key, inputs, hashes = prompt
        assert inputs["pixel_values"].dtype == torch.bfloat16 and inputs["image_grid_thw"].dtype == torch.int64
        queued.setdefault(key, []).append((id(inputs["pixel_values"]), hashes))
        given.append(weakref.ref(inputs["pixel_values"]))
        return add(number, key, params)

    counting.add_request = add_request
    step, held = counting.step, []

    def look():
        if len(counting.added) == 15:
            gc.collect()
            held.append({ref() for ref in given})
        return step()

    counting.step = look
    assert sum(len(answers) for answers in engine.answers(range(5), encode)) == 15 and len(times) == 5
    assert held[0] == {None}  # all 15 are queued, and their answers are to come
    assert all(len(found) == 3 and len({place for place, _ in found}) == 1 for found in queued.values())
    for item, found in queued.items():
        pixels = torch.full((4, 6), item / 3).bfloat16()
        wanted = media.media_hashes({"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 2, 2]])})
        assert [hashes for _, hashes in found] == [wanted] * 3


def test_a_broken_off_request_is_named(start, monkeypatch):
    engine, counting = start()
    step = counting.step

    def broken():
        done = step()
        for output in done:
            output.outputs[0].finish_reason = "abort"
        return done

    counting.step = broken
    with pytest.raises(RuntimeError, match="prompt 0: vLLM broke off the request: abort"):
        list(engine.answers([0], lambda item: [ask(item)]))


def test_a_prompt_that_does_not_fit_is_named():
    engine = VllmEngine.__new__(VllmEngine)
    engine._llm = SimpleNamespace(model_config=SimpleNamespace(max_model_len=6))
    with pytest.raises(ConfigError, match="prompt 3: a prompt of 2 tokens and an answer of up to 5 do not fit"):
        engine._request(ask(3), {}, {})


def test_a_stop_iteration_of_the_work_is_no_end():
    def work(item):
        if item == 1:
            raise StopIteration
        return item

    with Ahead(range(3), work, limit=2) as results:
        assert next(results) == 0
        with pytest.raises(RuntimeError, match="StopIteration"):
            next(results)
        assert list(results) == [2]


def test_what_the_items_raise_comes_after_the_results_before_it():
    def items():
        yield 0
        yield 1
        raise ValueError("no third")

    with Ahead(items(), lambda item: item, limit=4) as results:
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(ValueError, match="no third"):
            next(results)
        assert list(results) == []
