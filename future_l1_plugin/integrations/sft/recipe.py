"""What an SFT recipe may say: the keys of `recipes/sft*.yaml`, their types and defaults.

`recipes/sft.yaml` explains each key, with its unit and source; the defaults here are the paper's, but for
`latent.train_going_on`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.sft.deepspeed import NAMES, NO_FSDP
from future_l1_plugin.latent.loss import LOSSES
from future_l1_plugin.values import at_least, one_of


@dataclass
class DataRecipe:
    """Where the records are and how they are shown."""

    records: str = "???"  # JSON, JSONL or parquet of TwiFF records
    videos: str = ""  # root of the records' video paths
    on_bad: str = "raise"  # raise | skip: what to do with records that cannot be used
    max_failed: int = 100  # records that may fail only when they are decoded, under skip
    question_media: str = "images"  # images | video: how question frames are shown
    spans: bool = True  # False: leave the future frames out (text-only control)
    max_length: int = 16384  # tokens per sample may have
    cache_mb: int = 0  # decoded frames kept in memory by each worker, in MiB
    workers: int = 2  # data loader processes


@dataclass
class LatentRecipe:
    """The latent loss, how many latents a future frame gets, and what the latent inputs are.

    null = keep the checkpoint's value; `train_going_on` (see `model.objective`) and `own_*` (`OwnLatents` there) are no
    part of a checkpoint.
    """

    loss: str | None = None  # mse | sum_mse | cosine
    weight: float | None = None  # lambda, the latent loss beside the cross-entropy
    max_latent_token: int | None = None
    train_fixed_latent_budget: int | None = None
    train_going_on: bool = True  # train the choice to go on in a span; False = the paper's. A fixed budget has none
    own_share: float = 0.0  # share of the samples fed the model's own latents; 0 = e* everywhere, the paper's
    own_passes: int = 4  # passes without gradient that these are found by
    own_mean_cosine: float | None = None  # draw them from the vMF with this mean cosine around mu; null = mu itself


@dataclass
class LoraRecipe:
    """LoRA on the text decoder's linear layers; rank 0 = full fine-tuning."""

    rank: int = 0
    alpha: int = 32
    dropout: float = 0.0
    bits: int | None = None  # 4 = QLoRA: the layers that have adapters are held in NF4; null = as all weights are


@dataclass
class TrainRecipe:
    """Optimisation. Everything here is handed to transformers.TrainingArguments."""

    epochs: float = 1.0
    max_steps: int = -1  # overrides epochs if positive
    batch_size: int = 128  # samples an optimiser step, over all devices
    micro_batch_size: int = 1  # samples a forward pass on one device
    packing: bool = False  # lay them one behind the other, without padding
    learning_rate: float = 1.0e-5
    schedule: str = "cosine"
    warmup_ratio: float = 0.1
    weight_decay: float = 0.1
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    precision: str = "auto"  # auto | bf16 | fp32: auto = bf16 where the device has it
    gradient_checkpointing: bool = False
    train_vision: bool = False  # vision tower and mergers; frozen in the paper
    attn_implementation: str | None = None
    seed: int = 0
    check_memory: bool = True  # refuse to start where the estimate exceeds the GPU's memory
    lora: LoraRecipe = field(default_factory=LoraRecipe)


@dataclass
class EvalRecipe:
    """Held-out records: their loss, and early stopping by it. Greedy decoding of a few prompts: are there spans?"""

    records: str | None = None  # as data.records; null = no evaluation while training
    videos: str | None = None  # root of their video paths; null = data.videos
    every: int = 100  # steps
    limit: int | None = 256  # records of the file, the first ones
    patience: int | None = None  # evaluations without a lower loss, after which the run ends with its best checkpoint
    prompts: int = 16  # decoded at each evaluation and, without `records`, at the end; 0 = none
    max_new_tokens: int = 256  # of each of them


@dataclass
class LogRecipe:
    """Reports and checkpoints. Console and metrics.jsonl are always written."""

    every: int = 10  # steps
    tensorboard: bool = True
    wandb: bool = False
    save_every: int = 500  # steps; 0 = at the end only
    keep: int = 2  # checkpoints kept for resuming
    resume: bool = True  # go on from the newest checkpoint in `output`


@dataclass
class HfTrainerRecipe:
    """What transformers.Trainer divides over the GPUs, where no checkout is named."""

    deepspeed: str | None = None  # zero2 | zero3 | zero2_offload | zero3_offload, or a path; null = nothing
    fsdp: str | None = None  # refused, with the reason; here so that whoever looks for it finds it


@dataclass
class QwenVlFinetuneRecipe:
    """Training inside an unmodified checkout of 2U1/Qwen-VL-Series-Finetune, with that project's own trainer."""

    path: str | None = None  # the checkout; null = transformers.Trainer
    deepspeed: str | None = None  # zero2 | zero3 | zero2_offload | zero3_offload, its files, or the path of another
    arguments: dict[str, Any] = field(default_factory=dict)  # flags of its TrainingArguments that have no key here


@dataclass
class SweepRecipe:
    """Several runs that differ in one key, each into `output`/KEY=VALUE."""

    key: str | None = None  # dotted, e.g. latent.weight; null = one run
    values: list[Any] = field(default_factory=list)
    only: Any = None  # run this value of them, or these


@dataclass
class SftRecipe:
    """A whole SFT run."""

    model: str = "???"  # latent checkpoint to start from
    output: str = "???"  # folder for checkpoints, logs and the final model (output/final)
    data: DataRecipe = field(default_factory=DataRecipe)
    latent: LatentRecipe = field(default_factory=LatentRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    eval: EvalRecipe = field(default_factory=EvalRecipe)
    log: LogRecipe = field(default_factory=LogRecipe)
    hf_trainer: HfTrainerRecipe = field(default_factory=HfTrainerRecipe)
    qwen_vl_finetune: QwenVlFinetuneRecipe = field(default_factory=QwenVlFinetuneRecipe)
    sweep: SweepRecipe = field(default_factory=SweepRecipe)

    def __post_init__(self) -> None:
        one_of("data.on_bad", self.data.on_bad, ("raise", "skip"))
        one_of("data.question_media", self.data.question_media, ("images", "video"))
        one_of("train.precision", self.train.precision, ("auto", "bf16", "fp32"))
        if self.latent.loss is not None:
            one_of("latent.loss", self.latent.loss, LOSSES)
        if not 0 <= self.latent.own_share <= 1:
            raise ConfigError(f"latent.own_share: expected a share of the samples, 0..1, found {self.latent.own_share}")
        cosine = self.latent.own_mean_cosine
        if cosine is not None and not 0 < cosine < 1:
            raise ConfigError(f"latent.own_mean_cosine: expected null or a number between 0 and 1, found {cosine}")
        if self.data.max_failed < 0:
            raise ConfigError(f"data.max_failed: expected 0 (none) or more, found {self.data.max_failed}")
        least_one = (
            (self.train, "train", ("batch_size", "micro_batch_size")),
            (self.log, "log", ("every", "keep")),
            (self.latent, "latent", ("own_passes",)),
            (self.eval, "eval", ("every", "limit", "patience", "max_new_tokens")),
        )
        for section, name, keys in least_one:
            for key in keys:
                if (value := getattr(section, key)) is not None:
                    at_least(f"{name}.{key}", value, 1)
        at_least("eval.prompts", self.eval.prompts, 0)
        for key in ("videos", "patience"):
            if getattr(self.eval, key) is not None and self.eval.records is None:
                raise ConfigError(f"eval.{key}: has no effect without held-out records. Set eval.records as well")
        if self.eval.patience is not None and self.log.save_every != self.eval.every:
            raise ConfigError(
                "eval.patience: a run that stops early ends with the weights of its best evaluation, so each needs "
                f"a checkpoint. log.save_every is {self.log.save_every}, eval.every {self.eval.every}: make them "
                "equal"
            )
        if not 0 <= self.train.warmup_ratio < 1:  # from 1 on, transformers would take it for a number of steps
            raise ConfigError(
                f"train.warmup_ratio: expected a share of the steps, 0 <= x < 1, found {self.train.warmup_ratio}"
            )
        if self.train.packing and self.qwen_vl_finetune.path:
            raise ConfigError(
                "train.packing: Qwen-VL-Series-Finetune has a forward pass of its own, which was not shown to keep "
                "packed samples apart. Set packing to false, or qwen_vl_finetune.path to null"
            )
        if self.train.lora.rank and self.train.train_vision:
            raise ConfigError(
                "train.train_vision: LoRA trains the text decoder only. Set it to false, or lora.rank to 0"
            )
        self._check_bits()
        for section in ("hf_trainer", "qwen_vl_finetune"):
            value = getattr(self, section).deepspeed
            if value is not None and value not in NAMES and not Path(value).suffix:
                raise ConfigError(
                    f"{section}.deepspeed: expected one of {', '.join(NAMES)} or the path of a JSON, found {value!r}"
                )
        if self.hf_trainer.fsdp is not None:
            raise ConfigError(f"hf_trainer.fsdp: {NO_FSDP.format(key='hf_trainer.deepspeed')}, and set fsdp to null")
        host = self.qwen_vl_finetune
        if host.arguments and not host.path:
            raise ConfigError(
                f"qwen_vl_finetune.arguments: {', '.join(host.arguments)} are flags of Qwen-VL-Series-Finetune, and "
                "qwen_vl_finetune.path names no checkout of it. Give the path, or take them out"
            )
        if (self.sweep.key is None) != (not self.sweep.values):
            raise ConfigError("sweep: expected both key and values, or neither")

    def _check_bits(self) -> None:
        lora = self.train.lora
        if lora.bits is None:
            return
        if lora.bits != 4:
            raise ConfigError(f"train.lora.bits: expected 4 or null, found {lora.bits!r}")
        if not lora.rank:
            raise ConfigError("train.lora.bits: weights of 4 bits are not trained. Set train.lora.rank as well")
        if self.qwen_vl_finetune.path:
            raise ConfigError(
                "train.lora.bits: Qwen-VL-Series-Finetune gives adapters to quantised layers by code of its own. Set "
                "bits to null, or qwen_vl_finetune.path to null"
            )
        if self.hf_trainer.deepspeed:
            raise ConfigError(
                "train.lora.bits: DeepSpeed would divide or cast what bitsandbytes has packed. Set bits to null, or "
                "hf_trainer.deepspeed to null: each GPU then holds the 4 bits of all weights"
            )

    @property
    def sharding_key(self) -> str:
        """The key that says what is divided over the GPUs in the host where this recipe trains."""
        return f"{'qwen_vl_finetune' if self.qwen_vl_finetune.path else 'hf_trainer'}.deepspeed"

    @property
    def deepspeed(self) -> str | None:
        """The value of `sharding_key`."""
        return (self.qwen_vl_finetune if self.qwen_vl_finetune.path else self.hf_trainer).deepspeed

    def accumulation(self, devices: int) -> int:
        """Forward passes an optimiser step on each device."""
        a_pass = self.train.micro_batch_size * devices
        if self.train.batch_size % a_pass:
            raise ConfigError(
                f"train.batch_size {self.train.batch_size} is not a multiple of micro_batch_size "
                f"{self.train.micro_batch_size} x {devices} devices; change one of them"
            )
        return self.train.batch_size // a_pass
