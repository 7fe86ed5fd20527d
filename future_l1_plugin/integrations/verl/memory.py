"""How much memory an RL run needs on each GPU, phase by phase: arithmetic over counts, in bytes. Nothing is measured.

Where the formulas come from (verl 0.9.1, torch 2.13, vLLM 0.31):

- actor: FSDP2 shards every parameter over all GPUs in `fsdp_config.model_dtype` (verl/workers/engine/fsdp/
  transformer_impl.py `_build_module`); gradients and AdamW's two moments have that dtype, too. A unit (decoder layer,
  vision block, embedding, lm_head: verl/utils/fsdp_utils.py `_select_fsdp2_wrap_targets`) is gathered in `param_dtype`
  while it computes, and the next one beside it; its gradient is there in `param_dtype` and `reduce_dtype`. What is in
  no unit stays gathered. Gradients go at the end of an update (verl/workers/engine/base.py `zero_grad_on_exit`).
- reference: on the CPU, unit by unit on the GPU (`CPUOffloadPolicy` for engines that only run forward).
- logits: `logits / temperature` is a second copy. flash-attn's cross-entropy overwrites it with its gradient; without
  flash-attn (verl/utils/torch_functional.py `logprobs_from_logits_v2`) log-softmax is kept in float32. The pass for old
  log-probabilities takes entropies, too: in one compiled kernel, or by three float32 copies where nothing is compiled.
  With `actor.entropy_coeff` the update does, and keeps them for its gradient, chunked or not.
- activations of the decoder: as in `integrations.sft.memory`.
- latent_vllm: vLLM takes `gpu_memory_utilization` of the GPU and gives to the KV cache what weights and a trial pass
  leave (vllm/v1/worker/gpu_worker.py `determine_available_memory`). Asleep (level 2) it keeps neither.
- latent_hf: whole weights and the KV cache of a full batch; it does not sleep.

`ASLEEP`, `RESERVE` and `GRAPHS` are allowances, not formulas.
"""

from dataclasses import dataclass

from future_l1_plugin.integrations.sft.memory import Part

GIB = 2**30
RESERVE = 3 * GIB  # CUDA contexts of two processes, NCCL's buffers, what the allocator cannot join
ASLEEP = 2 * GIB  # a sleeping vLLM's CUDA graphs and workspaces
GRAPHS = 1 * GIB  # CUDA graphs of a vLLM that is awake
_ENTROPY_CHUNK = 2048  # rows, `entropy_from_logits_chunk_size`


@dataclass(frozen=True)
class ModelCounts:
    """Parameters of a model, and what its activations depend on."""

    total: int
    trained: int
    largest_unit: int  # parameters of FSDP2's largest unit
    outside_units: int  # parameters that are in none
    largest_tensor: int
    layers: int
    hidden: int
    inner: int  # of the MLP
    queries: int  # attention heads x their width
    keys: int  # key heads x their width
    vocabulary: int
    vision_layers: int
    vision_hidden: int
    vision_inner: int
    patches: int  # a token of an image or a video
    patch: int  # numbers in a patch
    stored: int  # bytes of a weight in the start checkpoint


@dataclass(frozen=True)
class Engine:
    """The rollout engine on each GPU."""

    sleeps: bool  # while the actor works
    pooled: bool  # takes `utilization` of the GPU (latent_vllm), or what it needs (latent_hf)
    utilization: float
    dtype: int  # bytes of a weight and of a number in the KV cache
    parallel: int  # tensor parallel: GPUs per engine
    sequences: int  # decoded together
    length: int  # tokens of the longest sequence
    batched: int  # tokens of a step
    bucket: int  # bytes sent at once when weights are updated


@dataclass(frozen=True)
class Setup:
    """What the run's settings say. dtypes are bytes a number."""

    gpus: int
    gpu_bytes: int
    tokens: int  # of a micro-batch in the update
    old_tokens: int  # in the pass for old log-probabilities
    reference_tokens: int | None  # in the reference's pass; None: there is no pass
    checkpointing: bool
    model_dtype: int
    param_dtype: int
    reduce_dtype: int
    weights_away: bool  # `param_offload`: on the CPU while another phase runs
    optimizer_away: bool  # `optimizer_offload`
    all_away: bool  # `offload_policy`: weights, gradients and optimiser on the CPU, always
    flash: bool  # flash-attn
    packed: bool  # `use_remove_padding`
    scaled: bool  # temperature is not 1
    entropy: str  # compiled | chunked | plain
    entropy_trained: bool  # `actor.entropy_coeff` or `calculate_entropy`: the update takes entropies, too
    vision_frozen: bool
    engine: Engine


def resident(m: ModelCounts, s: Setup) -> list[Part]:
    """What the actor keeps on the GPU while another phase runs."""
    b, by = s.model_dtype, f" / {s.gpus} GPUs"
    weights = 0 if s.weights_away or s.all_away else b * m.total / s.gpus
    moments = 0 if s.optimizer_away or s.all_away else 2 * b * m.trained / s.gpus
    return [
        Part("actor's weights", weights, f"{b} bytes x all{by}" if weights else "on the CPU"),
        Part("its optimiser", moments, f"{2 * b} x trained{by}: AdamW's moments" if moments else "on the CPU"),
    ]


def engine(m: ModelCounts, s: Setup) -> list[Part]:
    """The rollout engine while it decodes."""
    e = s.engine
    weights = Part("engine's weights", e.dtype * m.total / e.parallel, f"{e.dtype} bytes x all" + _over(e.parallel))
    if not e.pooled:
        tokens = e.sequences * e.length
        formula = f"{_kv(m, e):,} bytes x max_num_seqs x max_model_len ({tokens:,} tokens)"
        return [weights, Part("KV cache", _kv(m, e) * tokens, formula)]
    work, cache = _engine_work(m, e), kv_cache(m, s)
    return [
        weights,
        Part("engine's passes", work, "a step of max_num_batched_tokens, the largest clip, the sampler, CUDA graphs"),
        Part("KV cache", max(cache, 0), f"what {e.utilization:g} x {s.gpu_bytes / GIB:.1f} GiB leaves"),
    ]


def kv_cache(m: ModelCounts, s: Setup) -> float:
    """Bytes that vLLM has for its KV cache on a GPU; negative: it does not start."""
    return s.engine.utilization * s.gpu_bytes - s.engine.dtype * m.total / s.engine.parallel - _engine_work(m, s.engine)


def kv_tokens(m: ModelCounts, s: Setup) -> int:
    """Tokens that fit into an engine's KV cache."""
    if not s.engine.pooled:
        return s.engine.sequences * s.engine.length
    return max(0, int(kv_cache(m, s) // _kv(m, s.engine)))


def passing(m: ModelCounts, s: Setup, tokens: int, trains: bool, entropy: bool = False) -> list[Part]:
    """What a pass over a micro-batch of `tokens` tokens needs beside the weights."""
    b, n = s.param_dtype, tokens
    parts = [
        Part("gathered units", b * (2 * m.largest_unit + m.outside_units), f"{b} x (2 largest units + what is in none)")
    ]
    layer = b * n * (6 * m.hidden + 3 * m.queries + 4 * m.keys + 4 * m.inner)
    tower = b * n * (m.patches * (9 * m.vision_hidden + 2 * m.vision_inner + m.patch) + 4 * m.hidden)
    if trains:
        gradient = (b + s.reduce_dtype) * m.largest_unit
        parts.append(Part("a unit's gradient", gradient, f"{b + s.reduce_dtype} x the largest unit"))
        kept = b * n * m.hidden * m.layers + layer if s.checkpointing else layer * m.layers
        what = f"{m.layers} layers' inputs and one layer's" if s.checkpointing else f"{m.layers} layers'"
        parts.append(Part("decoder", kept, f"{what} activations of {n:,} tokens"))
        if not s.vision_frozen:
            blocks = m.vision_layers if not s.checkpointing else 1
            tower = tower * blocks + b * n * m.patches * m.vision_hidden * m.vision_layers
    else:
        parts.append(Part("decoder", layer, f"one layer's activations of {n:,} tokens"))
    parts.append(Part("vision tower", tower, f"as if all {n:,} tokens were pictures, {m.patches} patches each"))
    if not s.flash:
        parts.append(Part("attention mask", 3 * n * n, "sdpa: 3 x tokens x tokens"))
    copies = _logits_bytes(s, trains) + (_entropy_bytes(s, n, trains) if entropy else 0)
    parts.append(Part("logits", copies * n * m.vocabulary, f"{copies:.3g} bytes x {n:,} tokens x {m.vocabulary:,}"))
    return parts


def phases(m: ModelCounts, s: Setup) -> dict[str, list[Part]]:
    """What lies on each GPU in each phase of a step."""
    asleep = [Part("sleeping engine", ASLEEP, "an allowance")] if s.engine.sleeps else engine(m, s)
    away = resident(m, s)
    # With `param_offload` they come back for a pass.
    here = [Part("actor's weights", 0 if s.all_away else s.model_dtype * m.total / s.gpus, away[0].formula), away[1]]
    found = {"rollout": [*engine(m, s), *away]}
    found["old log-probabilities"] = [*asleep, *here, *passing(m, s, s.old_tokens, False, entropy=True)]
    if s.reference_tokens is not None:
        found["reference"] = [*asleep, *away, *passing(m, s, s.reference_tokens, False)]
    b, by = s.model_dtype, f" / {s.gpus} GPUs"
    states = 0 if s.all_away else 3 * b * m.trained / s.gpus
    where = "on the CPU" if s.all_away else f"{3 * b} x trained{by}: gradients, AdamW's moments"
    work = passing(m, s, s.tokens, True, s.entropy_trained)
    found["update"] = [*asleep, here[0], Part("gradients, optimiser", states, where), *work]
    awake = [engine(m, s)[0]] if s.engine.pooled and s.engine.sleeps else engine(m, s)
    sent = (s.model_dtype + s.engine.dtype) * m.largest_tensor + s.engine.bucket
    what = f"the largest whole tensor ({m.largest_tensor:,} numbers) in both dtypes, and a bucket"
    found["weight update"] = [*awake, *away, Part("sent", sent, what)]
    return {name: [*parts, Part("reserve", RESERVE, "an allowance")] for name, parts in found.items()}


def needed(parts: list[Part]) -> float:
    """Their sum, in bytes."""
    return sum(part.bytes for part in parts)


def checkpoint_bytes(m: ModelCounts, s: Setup, contents: list[str]) -> dict[str, float]:
    """On disk, by `checkpoint.save_contents`; the HF model has the start checkpoint's dtype."""
    b = s.model_dtype
    sizes = {"model": b * m.total, "optimizer": 2 * b * m.trained, "hf_model": m.stored * m.total}
    return {name: sizes.get(name, 0) for name in contents}


def _logits_bytes(s: Setup, trains: bool) -> float:
    """Bytes a number of (tokens, vocabulary) at the peak."""
    b = s.param_dtype
    copies = b * (1 + s.scaled) + (0 if s.packed else b)  # padded ones are copied without their padding
    if not trains:
        return copies
    if s.flash:
        return max(copies, 2 * b)
    return copies + 4 if b < 4 else 4 * b  # log-softmax in float32; or logsumexp's and gather's gradients


def _entropy_bytes(s: Setup, tokens: int, trains: bool) -> float:
    if trains:  # its own gradient of the logits, and cross-entropy's that is not written over them
        return 2 * s.param_dtype + (0 if s.entropy == "compiled" and s.packed else 12)
    if s.entropy == "compiled" and s.packed:
        return 0
    return 12 * (min(1.0, _ENTROPY_CHUNK / tokens) if s.entropy == "chunked" and s.packed else 1)


def _kv(m: ModelCounts, e: Engine) -> int:
    """Bytes of a token in the KV cache of a GPU."""
    return 2 * m.layers * m.keys * e.dtype // e.parallel


def _engine_work(m: ModelCounts, e: Engine) -> float:
    """What vLLM's trial pass takes: a step, the vision tower over the largest clip, logits; and CUDA graphs."""
    step = e.dtype * e.batched * (6 * m.hidden + 3 * m.inner / e.parallel)
    tower = e.dtype * e.length * m.patches * (9 * m.vision_hidden + 2 * m.vision_inner + m.patch)
    return step + tower + 8 * e.sequences * m.vocabulary + GRAPHS


def _over(parallel: int) -> str:
    return f" / {parallel}" if parallel > 1 else ""
