"""Part b. What latents add to a decoding step: does it wait for the device, and does a CUDA graph hold it?

Pieces: the span grammar with a fixed batch (`SpanMachine`) and with requests that come and go (`SpanTable`, vLLM's),
the samplers (vMF, Gaussian, and vLLM's counter-based noise), the latent that is written over the next input embedding,
and the probability of ending the span. Each runs at batch 64, 128 and 1024,

    under `torch.cuda.set_sync_debug_mode("error")`, where waiting for the device raises,
    inside a captured CUDA graph, whose replays must equal the plain calls (samplers: draw anew at each replay, at the
    policy's mean cosine, since their noise is the generator's), and
    against the clock.

Rules: no wait; a graph that holds and agrees; the mean cosine of draws within 0.01 of 0.9. Times are only reported.
A CPU has neither waits nor graphs: there the plain calls run and are compared with themselves after a reset.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from future_l1_plugin.gpu_check.results import Recorder
from future_l1_plugin.integrations.vllm.noise import draw
from future_l1_plugin.integrations.vllm.spans import SpanTable
from future_l1_plugin.latent import LatentTokens, SpanBudget, SpanMachine, build_policy
from future_l1_plugin.model.decode import _Feedback, log_softmax_at

TOKENS = LatentTokens(latent=3, start=4, end=5)
BUDGET = SpanBudget(4)
STEPS = 24
GPU_ONLY = "needs a CUDA device"


@dataclass
class Piece:
    """step(): one step over static inputs, into `out`. reset(): as at the beginning. feed(i): the inputs of step i."""

    step: Callable[[], None]
    out: Tensor
    reset: Callable[[], None] = lambda: None
    feed: Callable[[int], None] = lambda i: None
    cosine: Tensor | None = None  # of a sampler: the mu to measure its draws against


def run(results: Recorder, setting) -> None:
    """Every piece at every batch size."""
    batches = (4, 8) if setting.small else (64, 128, 1024)
    width, vocabulary = (128, 512) if setting.small else (4096, 151936)
    for name, make in PIECES.items():
        timed: dict[str, dict[str, float]] = {"plain": {}, "graph": {}}
        for batch in batches:
            torch.manual_seed(0)
            piece = make(batch, width, vocabulary, setting.device)
            wanted = outputs(piece, piece.step)  # warm-up, too
            check_plain(results, f"{name}, batch {batch}", piece, wanted, setting.cuda)
            timed["plain"][f"{batch}"] = milliseconds(piece.step, setting.cuda)
            if setting.cuda:
                replay = check_graph(results, f"{name}, batch {batch}", piece, wanted)
                timed["graph"][f"{batch}"] = milliseconds(replay, True)
        results.number(f"{name}: plain, by batch", timed["plain"], "ms per step")
        if setting.cuda:
            results.number(f"{name}: in a graph, by batch", timed["graph"], "ms per step")
        else:
            results.skip(f"{name}: waits, graph", GPU_ONLY)


def check_plain(results: Recorder, name: str, piece: Piece, wanted: list[Tensor], cuda: bool) -> None:
    """The plain calls once more, where waiting raises. Without a GPU: that they repeat themselves."""
    if not cuda:
        check_outputs(results, f"{name}: repeats itself", piece, outputs(piece, piece.step), wanted)
        return
    piece.reset()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        piece.step()
        found = ""
    except RuntimeError as error:
        found = str(error).splitlines()[0][:200]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    results.check(f"{name}: does not wait for the device", not found, found)


def check_graph(results: Recorder, name: str, piece: Piece, wanted: list[Tensor]) -> Callable[[], None]:
    """Capture a step and compare its replays; returns what replays it."""
    piece.reset()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        piece.step()
    check_outputs(results, f"{name}: a graph's replays agree", piece, outputs(piece, graph.replay), wanted)
    return graph.replay


def outputs(piece: Piece, step: Callable[[], None]) -> list[Tensor]:
    """What `STEPS` steps from the beginning leave in `out`."""
    piece.reset()
    found = []
    for i in range(STEPS):
        piece.feed(i)
        step()
        found.append(piece.out.clone())
    return found


def check_outputs(results: Recorder, name: str, piece: Piece, found: list[Tensor], wanted: list[Tensor]) -> None:
    """Equal, or for samplers: new draws each time, at the right cosine."""
    if piece.cosine is None:
        wrong = sum(not torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        results.check(name, not wrong, f"{wrong} of {len(found)} steps differ")
        return
    mean = float(torch.cosine_similarity(torch.stack(found).double(), piece.cosine.double(), dim=-1).mean())
    new = not torch.equal(found[0], found[1])
    results.check(name, new and abs(mean - 0.9) < 0.01, f"mean cosine {mean:.3f}, new draws: {new}")


def milliseconds(step: Callable[[], None], cuda: bool, turns: int = 50) -> float:
    """Milliseconds per step, over `turns` in a row."""
    wait = torch.cuda.synchronize if cuda else lambda: None
    wait()
    begin = time.perf_counter()
    for _ in range(turns):
        step()
    wait()
    return (time.perf_counter() - begin) * 1000 / turns


def proposals(batch: int, device: torch.device) -> Tensor:
    """Long (STEPS, batch): every second opens a span where it can, some end one."""
    ids = torch.tensor([TOKENS.start, TOKENS.start, TOKENS.start, TOKENS.end, 0, 1])
    return ids[torch.randint(len(ids), (STEPS, batch))].to(device)


def machine_piece(batch: int, width: int, vocabulary: int, device: torch.device) -> Piece:
    """`SpanMachine`: forbid, step. Its state is kept in place, as a graph needs it."""
    given, chosen = proposals(batch, device), torch.zeros(batch, dtype=torch.long, device=device)
    logits = torch.zeros(batch, vocabulary, device=device)
    machine = SpanMachine(TOKENS, BUDGET, batch, device)
    inside, length, out = machine.inside, machine.length, torch.zeros(3, batch, dtype=torch.long, device=device)

    def step() -> None:
        machine.inside, machine.length = inside, length
        machine.forbid(logits)
        found = machine.step(chosen)
        inside.copy_(machine.inside)
        length.copy_(machine.length)
        for row, value in zip(out, found, strict=True):
            row.copy_(value)

    def reset() -> None:
        inside.zero_()
        length.zero_()
        logits.zero_()

    return Piece(step, out, reset, lambda i: chosen.copy_(given[i]))


def table_piece(batch: int, width: int, vocabulary: int, device: torch.device) -> Piece:
    """`SpanTable`: the same for rows that are picked out of a table twice as large, a quarter of them not live."""
    given, chosen = proposals(batch, device), torch.zeros(batch, dtype=torch.long, device=device)
    logits = torch.zeros(batch, vocabulary, device=device)
    rows = torch.randperm(2 * batch)[:batch].to(device)
    live = torch.rand(batch, device=device) < 0.75
    table = SpanTable(TOKENS, 2 * batch, device, force_start=True)
    out = torch.zeros(3, batch, dtype=torch.long, device=device)

    def step() -> None:
        table.forbid(rows, logits)
        for row, value in zip(out, table.step(rows, chosen, live), strict=True):
            row.copy_(value)

    def reset() -> None:
        logits.zero_()
        for row in range(2 * batch):
            table.begin(row, SpanBudget(2 + row % 3, exact=row % 2 == 0), [])

    return Piece(step, out, reset, lambda i: chosen.copy_(given[i]))


def sampler_piece(policy) -> Callable[..., Piece]:
    """`policy.sample` with the device's own generator."""

    def make(batch: int, width: int, vocabulary: int, device: torch.device) -> Piece:
        mu = torch.randn(batch, width, device=device).to(torch.bfloat16)
        out = torch.zeros_like(mu)
        return Piece(lambda: out.copy_(policy.sample(mu)), out, cosine=mu)

    return make


def noise_piece(batch: int, width: int, vocabulary: int, device: torch.device) -> Piece:
    """vLLM's draws: a function of seed and position, so replays must equal the plain calls bit by bit."""
    policy, mu = build_policy("vmf", mean_cosine=0.9), torch.randn(batch, width, device=device).to(torch.bfloat16)
    seed, position = torch.arange(batch, device=device), torch.zeros(batch, dtype=torch.long, device=device)
    out = torch.zeros_like(mu)
    return Piece(lambda: out.copy_(draw(policy, mu, seed, position)), out, feed=position.fill_)


def write_piece(batch: int, width: int, vocabulary: int, device: torch.device) -> Piece:
    """The hook of `generate` that writes latents over the embeddings of one step."""
    table = nn.Embedding(64, width, device=device, dtype=torch.bfloat16).requires_grad_(False)
    ids = torch.randint(64, (batch, 1), device=device)
    rows, latents = torch.rand(batch, 1, 1, device=device) < 0.5, torch.randn(batch, 1, width, device=device)
    latents, out = latents.to(torch.bfloat16), torch.zeros(batch, 1, width, device=device, dtype=torch.bfloat16)
    feedback = _Feedback()
    table.register_forward_hook(feedback._write)

    def step() -> None:
        feedback.rows, feedback.latents = rows, latents
        out.copy_(table(ids))

    return Piece(step, out)


def end_piece(batch: int, width: int, vocabulary: int, device: torch.device) -> Piece:
    """log p(end) of each row, which a rollout with a free budget records."""
    logits, out = torch.randn(batch, vocabulary, device=device), torch.zeros(batch, device=device)
    return Piece(lambda: out.copy_(log_softmax_at(logits, TOKENS.end)), out)


#: At a mean cosine of 0.9 both: sigma = tan(angle) for coordinates of mu with a standard deviation of 1.
PIECES: dict[str, Callable[..., Piece]] = {
    "grammar": machine_piece,
    "grammar of vLLM": table_piece,
    "vMF sampler": sampler_piece(build_policy("vmf", mean_cosine=0.9)),
    "Gaussian sampler": sampler_piece(build_policy("gaussian", sigma=(1 / 0.9**2 - 1) ** 0.5)),
    "vLLM's noise": noise_piece,
    "latent write": write_piece,
    "log p(end)": end_piece,
}
