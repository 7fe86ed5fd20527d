"""How much GPU memory an SFT run needs: arithmetic over counts, in bytes. Nothing is measured.

Model states (weights, gradients, optimiser) under ZeRO follow DeepSpeed's own `estimate_zero2_model_states_mem_needs`
and `estimate_zero3_..`, with frozen weights counted as weights only. Activations are a rough estimate of their own.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Part:
    """One line of an estimate."""

    name: str
    bytes: float
    formula: str


@dataclass(frozen=True)
class Sharding:
    """DeepSpeed's ZeRO: what is divided over the GPUs, and what lies in the CPU's memory instead."""

    stage: int  # 0..3
    offload_optimizer: bool = False  # gradients and optimiser states
    offload_weights: bool = False  # stage 3 only

    @classmethod
    def from_config(cls, config: dict) -> "Sharding":
        """Of a DeepSpeed configuration file."""
        zero = config.get("zero_optimization", {})

        def away(name: str) -> bool:
            return zero.get(name, {}).get("device", "none") != "none"

        stage = zero.get("stage", 0)
        return cls(stage, away("offload_optimizer"), stage == 3 and away("offload_param"))


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model, and what its activations depend on."""

    trained: int
    frozen: int
    largest: int  # in the module with the most parameters of its own: ZeRO-3 gathers module by module
    layers: int
    hidden: int
    inner: int  # of the MLP
    queries: int  # attention heads x their width
    keys: int  # key heads x their width
    vocabulary: int
    tied: bool = False  # lm_head is the input embedding
    rows: bool = False  # of the embeddings, only the rows of the latent tokens are trained, as under LoRA
    packed: int = 0  # parameters held in 4 bits, among the frozen ones


def model_states(sizes: Sizes, gpus: int, bf16: bool, sharding: Sharding | None) -> list[Part]:
    """Bytes on each GPU, without activations.

    Args:
        bf16: without ZeRO, float32 weights under autocast; with ZeRO, bf16 weights and float32 optimiser states.
        sharding: None = each GPU holds everything.
    """
    t, every = sizes.trained, sizes.trained + sizes.frozen
    if sharding is None:
        parts = [
            _weights(sizes),
            Part("gradients", 4 * t, "4 x trained"),
            Part("optimiser (AdamW)", 8 * t, "8 x trained: two moments in float32"),
        ]
        if bf16:
            parts.append(Part("autocast", 2 * t, "2 x trained: bf16 copies, kept until a pass ends"))
        if gpus > 1:
            parts.append(Part("gradient buckets", 4 * t, "4 x trained: DistributedDataParallel's"))
        return parts + _rows(sizes, 6 if bf16 else 4)
    b = 2 if bf16 else 4
    stage, n = sharding.stage, gpus
    weights = 0 if sharding.offload_weights else b * every / (n if stage == 3 else 1)
    gradients = 0 if sharding.offload_optimizer else b * t / (n if stage == 3 else 1)
    states = 0 if sharding.offload_optimizer else 16 * t / (n if stage >= 1 else 1)
    by = f" / {n} GPUs" if n > 1 else ""
    parts = [
        Part("weights", weights, "on the CPU" if not weights else f"{b} bytes x all{by if stage == 3 else ''}"),
        Part("gradients", gradients, "on the CPU" if not gradients else f"{b} x trained{by if stage == 3 else ''}"),
        Part(
            "optimiser (AdamW)",
            states,
            "on the CPU" if not states else f"16 x trained{by}: weights, gradients, two moments in float32",
        ),
    ]
    if stage == 3:
        parts.append(Part("gathered", 2 * b * sizes.largest, f"{2 * b} x the largest module ({sizes.largest:,})"))
    return parts + _rows(sizes, b)


def _weights(sizes: Sizes) -> Part:
    """4 bits of NF4 with a scale of 8 bits for each 64 weights, and one in float32 for 256 of those."""
    every = sizes.trained + sizes.frozen
    if not sizes.packed:
        return Part("weights", 4 * every, "4 bytes x all")
    nf4 = (4 + 8 / 64 + 32 / 64 / 256) / 8
    formula = f"{nf4:.3f} bytes x {sizes.packed:,} in NF4 + 4 x the rest"
    return Part("weights", nf4 * sizes.packed + 4 * (every - sizes.packed), formula)


def _rows(sizes: Sizes, b: int) -> list[Part]:
    """PEFT puts trained rows into a copy of their matrix at each pass. lm_head's lives until the pass ends."""
    if not sizes.rows:
        return []
    whole = sizes.vocabulary * sizes.hidden
    return [Part("rows trained", 2 * b * whole, f"{2 * b} x lm_head ({whole:,}): a copy that holds them, its gradient")]


def with_lora(sizes: Sizes, rank: int) -> Sizes:
    """The sizes of the model with LoRA of that rank on the text decoder's seven linear layers; of the rest only the
    rows of the latent tokens are trained."""
    h, i = sizes.hidden, sizes.inner
    a_layer = 2 * (h + sizes.queries) + 2 * (h + sizes.keys) + 3 * (h + i)  # q, o; k, v; gate, up, down
    rows = 3 * h * (1 if sizes.tied else 2)  # of the latent tokens
    trained = rank * a_layer * sizes.layers + rows
    return replace(sizes, trained=trained, frozen=sizes.trained + sizes.frozen, rows=True)


def with_four_bits(sizes: Sizes) -> Sizes:
    """The sizes with the text decoder's linear layers in 4 bits."""
    a_layer = 2 * sizes.hidden * (sizes.queries + sizes.keys) + 3 * sizes.hidden * sizes.inner
    return replace(sizes, packed=a_layer * sizes.layers)


def a_checkpoint(sizes: Sizes, bf16: bool, sharding: Sharding | None) -> float:
    """Bytes on disk of a checkpoint that a run resumes from: weights, two moments, under DeepSpeed float32 weights."""
    b = 2 if bf16 and sharding is not None else 4
    return b * (sizes.trained + sizes.frozen) + (8 if sharding is None else 12) * sizes.trained


def activations(sizes: Sizes, tokens: int, bf16: bool, checkpointing: bool) -> list[Part]:
    """Bytes on each GPU for a forward pass with gradients of `tokens` tokens; vision tower and buffers are left out.

    A layer keeps for each token: six vectors of the hidden size (both norms in and out, both residuals), queries three
    times and keys and values twice (projected, rotated, attended), four of the MLP's width.
    """
    b = 2 if bf16 else 4
    layer = b * tokens * (6 * sizes.hidden + 3 * sizes.queries + 4 * sizes.keys + 4 * sizes.inner)
    a_layer = f"{b} bytes x {tokens:,} tokens x (6 hidden + 3 queries + 4 keys + 4 inner)"
    if checkpointing:
        kept = b * tokens * sizes.hidden * sizes.layers + layer
        formula = f"{b} x {tokens:,} x hidden x {sizes.layers} layers + one layer's {a_layer}"
    else:
        kept, formula = layer * sizes.layers, f"{a_layer} x {sizes.layers} layers"
    logits = tokens * sizes.vocabulary * (2 * b + 8)
    return [
        Part("layers", kept, formula),
        Part("logits", logits, f"{2 * b + 8} x {tokens:,} x vocabulary: they, log-softmax, both gradients"),
    ]
