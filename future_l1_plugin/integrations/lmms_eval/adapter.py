"""The chat model `future_l1` of lmms-eval: batched latent decoding, with responses kept on disk as they come.

    lmms-eval --model future_l1 --model_args pretrained=PATH,batch_size=8 --tasks futurebench
    lmms-eval --model future_l1 --model_args 'pretrained=PATH,engine=vllm,vllm_args={"max_num_seqs": 64}' ..

Arguments are checked when the model is made; weights are loaded at the first request that needs them. lmms-eval makes
the model before the tasks, so a task that names missing videos still does so before anything large is loaded, and a
finished run that is repeated loads nothing.

Not supported (an error says so): log-likelihood tasks, multi-round tasks, audio, clips cut by start and end time.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from lmms_eval import utils
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm

from future_l1_plugin.data.frame_choice import Evenly
from future_l1_plugin.errors import CheckpointError, ConfigError, DataError
from future_l1_plugin.integrations.lmms_eval.engines import describe_engine, vllm_engine
from future_l1_plugin.integrations.lmms_eval.inputs import InputBuilder, described
from future_l1_plugin.integrations.lmms_eval.provenance import announce
from future_l1_plugin.integrations.lmms_eval.rows import KeyedInstance, result_of, row_of
from future_l1_plugin.integrations.lmms_eval.settings import Arguments, Generation
from future_l1_plugin.journal import Journal, checkpoint_mark, fingerprint, key_of
from future_l1_plugin.latent import build_policy
from future_l1_plugin.model import LatentConfig, chat_template, load
from future_l1_plugin.model.checkpoint import load_processor
from future_l1_plugin.model.engine import Answer, Engine, Request, TransformersEngine, named
from future_l1_plugin.model.training import check_whole, sources

SHOWN = 10  # bad samples that an error lists


class FutureL1(lmms):
    """Latent Qwen3-VL under lmms-eval.

    Arguments: see `settings.Arguments`.

    Raises:
        ConfigError: unknown or bad argument. CheckpointError: no latent checkpoint. EnvironmentMismatch: no vLLM.
    """

    is_simple = False

    def __init__(self, pretrained: str, **given: Any) -> None:
        super().__init__()
        args = Arguments.from_given({"pretrained": pretrained, **given})
        self.pretrained, self.engine_name = args.pretrained, args.engine
        self.dtype, self.batch_size = args.dtype, args.batch_size
        self.attn_implementation = args.attn_implementation
        self.system_prompt = None if args.system_prompt is None else self._resolve_system_prompt(args.system_prompt)
        self.policy = build_policy(args.policy, **args.policy_kwargs)
        self._random_latents = args.policy != "deterministic"
        self._view, self._budget = args.view, args.budget
        self._resume, self._skip_bad = args.resume, args.skip_bad

        self.accelerator = Accelerator()
        # As lmms-eval counts them: of two processes without a GPU accelerate believes that each is alone.
        shared = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._rank = torch.distributed.get_rank() if shared else 0
        self._world_size = torch.distributed.get_world_size() if shared else 1
        self._device = self._choose_device(args.device)
        self._latent, commit = self._checked_config()
        self._engine = self._choose_engine({"name": args.policy, **args.policy_kwargs}, args.vllm_args)
        self._identity = {
            "checkpoint": [self.pretrained, commit, *checkpoint_mark(self.pretrained)],
            "dtype": self.dtype,
            "attention": self.attn_implementation,
            "view": self._view,
            "system_prompt": self.system_prompt,
            "policy": [args.policy, args.policy_kwargs],
            "budget": self._budget,
        }
        if args.engine != "hf":  # whose stored responses are older than the choice
            self._identity["engine"] = describe_engine(self._engine)
        path = Path(self.pretrained).resolve() if Path(self.pretrained).exists() else Path(self.pretrained)
        default = Path("outputs/lmms_eval") / f"{path.name}-{key_of(str(path))[:8]}.jsonl"
        self._log = Journal(args.responses or default, self._rank)
        announce(self.describe)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "FutureL1":
        """lmms-eval's way to make a model; here --batch_size and --device may also stand in --model_args."""
        args = utils.simple_parse_args_string(arg_string)
        for name, value in (additional_config or {}).items():
            # lmms-eval always passes its own default batch size, 1; a model argument is meant to replace it.
            if value is None or (name == "batch_size" and str(value) == "1" and name in args):
                continue
            if name == "max_batch_size":
                raise ConfigError("--max_batch_size: future_l1 does not search for a batch size; use --batch_size N")
            if name in args and str(args[name]) != str(value):
                raise ConfigError(f"--{name} {value} and --model_args {name}={args[name]} differ: give one of them")
            args[name] = value
        if "pretrained" not in args:
            raise ConfigError("model_args of future_l1: expected pretrained=PATH, a latent checkpoint")
        return cls(**args)

    def _choose_device(self, device: str | None) -> torch.device:
        if self._world_size > 1:
            found = self.accelerator.device
            if device is not None and torch.device(device).type != found.type:
                raise ConfigError(
                    f"device={device}, but the launcher gives the {self._world_size} processes {found.type} devices: "
                    "leave the argument out"
                )
            return found
        return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def _choose_engine(self, policy: dict[str, Any], vllm_args: dict[str, Any]) -> Engine:
        if self.engine_name == "hf":
            checkpoint = {
                "path": self.pretrained,
                "device": self._device,
                "dtype": self.dtype,
                "attn_implementation": self.attn_implementation,
                **self._budget,
            }
            return TransformersEngine(partial(load, **checkpoint), self._latents_from)
        if self._world_size > 1:
            raise ConfigError(
                f"engine=vllm: expected one process, found {self._world_size}. Start lmms-eval without a launcher, and "
                'give vLLM the devices: vllm_args={"tensor_parallel_size": N}'
            )
        check_whole(self.pretrained, "pretrained")
        return vllm_engine(self.pretrained, self.dtype, self._latent.budget, policy, vllm_args)

    def _checked_config(self) -> tuple[LatentConfig, str | None]:
        """The checkpoint's latent keys, with ours over them, and the hub's commit, None for a folder."""
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(sources(self.pretrained).config)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"pretrained={self.pretrained}: expected a folder with a latent Qwen3-VL checkpoint, or a hub id that "
                f"can be reached ({error})"
            ) from error
        return replace(LatentConfig.from_hf(config), **self._budget), getattr(config, "_commit_hash", None)

    def _processor(self) -> Any:
        processor = load_processor(sources(self.pretrained).processor, self._latent)
        if self.system_prompt is not None:
            processor.chat_template = chat_template(self.system_prompt)
        return processor

    @cached_property
    def _build(self) -> InputBuilder:
        frames, *pixels = self._view.values()
        return InputBuilder(self._processor(), Evenly(frames), *pixels)

    def clean(self) -> None:
        """lmms-eval calls it after a run."""
        self._engine.close()
        super().clean()

    @property
    def device(self) -> torch.device:
        return self._device

    def describe(self) -> dict[str, Any]:
        """What its answers depend on, as JSON, for results.json: weights by hash, and what runs must share or tell."""
        processor = self._processor()
        sizes = {kind: getattr(processor, f"{kind}_processor").size for kind in ("image", "video")}
        return {
            "checkpoint": self.pretrained,
            "hash": key_of(*fingerprint(self.pretrained)),
            "frames": self._view["max_num_frames"],
            "pixels": {
                "min": self._view["min_pixels"],
                "max": self._view["max_pixels"],
                **{kind: [size["shortest_edge"], size["longest_edge"]] for kind, size in sizes.items()},
            },
            "prompt": {"template": key_of(processor.chat_template), "system_prompt": self.system_prompt},
            "decoding": {
                "dtype": self.dtype,
                "attention": self.attn_implementation,
                "policy": self._identity["policy"],
                "budget": asdict(self._latent.budget),
                "engine": describe_engine(self._engine),
            },
        }

    # ---- requests ---------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Responses in the order of the requests, special tokens kept."""
        return [result_of(row) if row else GenerationResult("") for row in self._respond(requests)]

    def _respond(self, requests: list[Instance]) -> list[dict[str, Any] | None]:
        """Rows of the response log in the order of the requests; None: padding, or bad media that is skipped."""
        rows: list[dict[str, Any] | None] = [None] * len(requests)
        known = self._log.read() if self._resume else {}
        pending = []
        for batch in self._batches(self._keyed(requests)):
            # All or nothing: who shares a batch has a say in the last digits, so a broken-off run keeps its batches.
            if all(instance.key in known for instance in batch):
                for instance in batch:
                    rows[instance.position] = known[instance.key]
            else:
                pending.append(batch)
        missing = sum(map(len, pending))
        logger.info(f"future_l1: {missing} of {len(requests)} responses to generate; kept in {self._log.path}")

        bad: dict[tuple, str] = {}
        done = len(requests) - missing
        with tqdm(total=len(requests), initial=done, desc="future_l1", unit="sample", disable=self.rank != 0) as bar:
            for answers in self._engine.answers(pending, partial(self._requests, bad)) if pending else ():
                found = {each.position: row_of(each, answer) | self._kept(answer) for each, answer in answers}
                self._log.append(found.values())
                for position, row in found.items():
                    rows[position] = row
                bar.update(len(answers))
        self._report(rows, bad)
        return rows

    def _keyed(self, requests: list[Instance]) -> Iterator[KeyedInstance]:
        copies: Counter[tuple] = Counter()
        for position, request in enumerate(requests):
            _, to_messages, settings, doc_id, task, split = request.args
            generation = Generation.from_task(settings)
            random = generation.temperature > 0 or self._random_latents
            copy = copies[task, split, doc_id]  # --repeats asks for several responses to one document
            copies[task, split, doc_id] += 1
            key = key_of(
                self._identity,
                asdict(generation),
                [task, split, doc_id, described(to_messages(self.task_dict[task][split][doc_id]))],
                [copy, torch.initial_seed()] if random else None,
            )
            if not request.metadata.get("__padding_only__"):  # evens out the ranks; its result is thrown away
                yield KeyedInstance(position, key, generation, request)

    def _batches(self, instances: Iterable[KeyedInstance]) -> Iterator[list[KeyedInstance]]:
        """Those of equal settings together, long prompts first: what does not fit into memory fails at once."""
        groups = defaultdict(list)
        for instance in instances:
            groups[instance.generation].append(instance)
        for group in groups.values():
            group.sort(key=lambda instance: -len(instance.request.args[0]))
            for start in range(0, len(group), self.batch_size):
                yield group[start : start + self.batch_size]

    def _requests(self, bad: dict[tuple, str], batch: list[KeyedInstance]) -> list[Request]:
        """Requests of those whose media are good; `bad` says why others have none. Engines call it in threads."""
        shown = []
        for instance in batch:
            with named(instance.name):
                inputs = self._inputs(bad, instance)
            if inputs is not None:
                shown.append((instance, inputs))
        seed = int(key_of([instance.key for instance, _ in shown])[:15], 16)
        return [Request(instance, inputs, instance.decoding, seed, instance.name) for instance, inputs in shown]

    def _inputs(self, bad: dict[tuple, str], instance: KeyedInstance) -> dict[str, torch.Tensor] | None:
        """What the processor returns; None if its media are bad, and `bad` says why."""
        task, split, doc_id = instance.document
        try:
            return self._build(instance.request.args[1](self.task_dict[task][split][doc_id]))
        except DataError as error:
            bad[instance.document] = str(error)
            return None

    def _latents_from(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Where the latents of these rows come from, as arguments of `generate`. Engine hf only."""
        return {"policy": self.policy}

    def _kept(self, answer: Answer) -> dict[str, Any]:
        """More fields, as JSON, of the row in the response log. Engine hf only."""
        return {}

    def _report(self, rows: list[dict[str, Any] | None], bad: dict[tuple, str]) -> None:
        """The cost of all responses, also of those read again (`throughput` in results.json); then the bad samples."""
        timed = [row for row in rows if row and "seconds" in row]  # logs of earlier versions have no times
        seconds, tokens, latents = (
            sum(row[name] for row in timed) for name in ("seconds", "output_tokens", "latent_tokens")
        )
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=tokens,
            avg_speed=tokens / seconds if seconds else 0.0,
            additional_metrics={"total_requests": len(timed), "latent_tokens": latents},
        )
        if not bad:
            return
        # Sorted, because an engine may have read them in threads.
        lines = [f"  {task}, {split} {doc_id}: {error}" for (task, split, doc_id), error in sorted(bad.items())]
        listed = "\n".join(lines[:SHOWN] + [f"  .. and {len(bad) - SHOWN} more"] * (len(bad) > SHOWN))
        if not self._skip_bad:
            raise DataError(
                f"{len(bad)} samples have images or videos that cannot be used. Fix them and run again (the other "
                f"responses are kept in {self._log.path}), or add skip_bad=True to --model_args to count them as "
                f"unanswered.\n{listed}"
            )
        logger.warning(f"{len(bad)} samples with bad images or videos count as unanswered (skip_bad):\n{listed}")

    def generate_until_multi_round(self, requests: list[Instance]) -> NoReturn:
        raise NotImplementedError("future_l1 answers in one turn: multi-round tasks cannot be run with it")

    def loglikelihood(self, requests: list[Instance]) -> NoReturn:
        raise NotImplementedError(
            "future_l1 generates: tasks of output_type multiple_choice or loglikelihood cannot be run with it"
        )
