"""The command line `future-l1 COMMAND`.

To add a command: write `_NAME_arguments(parser)` and `_NAME(args) -> int` and add a row to `COMMANDS`. Imports go
inside the functions, so that `future-l1 --help` loads neither torch nor a host. A `UserError` ends any command with its
message and exit code 2.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from future_l1_plugin import __version__
from future_l1_plugin.errors import UserError


@dataclass(frozen=True)
class Command:
    """One row of the table of commands."""

    name: str
    help: str
    arguments: Callable[[argparse.ArgumentParser], None] | None  # adds flags and positions; None: there are none
    run: Callable[[argparse.Namespace], int]  # returns the exit code


def _doctor(args: argparse.Namespace) -> int:
    from future_l1_plugin.doctor import checks, report

    return report(list(checks()))


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", help="a Qwen3-VL checkpoint: folder or hub id; only read")
    parser.add_argument("out", help="new folder for the latent checkpoint")
    parser.add_argument("--max-latent-token", type=int, default=4, help="latents a future frame (default: 4)")
    parser.add_argument("--system-prompt", help="opens conversations that bring no system turn (default: the paper's)")
    parser.add_argument(
        "--seed", type=int, default=0, help="initialises a projection head, if there is one (default: 0)"
    )
    parser.add_argument(
        "--dtype", help="of the weights and what is trained from them, such as float32 (default: the base's)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another key of LatentConfig, such as latent_loss=cosine or use_projection_head=true; repeatable",
    )


def _convert(args: argparse.Namespace) -> int:
    from future_l1_plugin.model import convert
    from future_l1_plugin.model.config import keys_from_words

    keys = keys_from_words(args.set)
    if args.system_prompt is not None:
        keys["system_prompt"] = args.system_prompt
    out = convert(args.base, args.out, max_latent_token=args.max_latent_token, seed=args.seed, dtype=args.dtype, **keys)
    print(f"latent checkpoint: {out}")
    return 0


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="checkpoint-N of an SFT run, full or LoRA, or a folder of its adapters")
    parser.add_argument("out", help="new folder for the latent checkpoint")
    parser.add_argument("--base", metavar="START", help="the checkpoint that the run started from, if it does not tell")


def _export(args: argparse.Namespace) -> int:
    from future_l1_plugin.model import export

    print(f"latent checkpoint: {export(args.checkpoint, args.out, args.base)}")
    return 0


def _tiny_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", help="new folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    parser.add_argument("--pretrained", action="store_true", help="the micro base that ships with the package instead")


def _tiny(args: argparse.Namespace) -> int:
    from future_l1_plugin.model import make_tiny
    from future_l1_plugin.model.tiny import copy_micro_base

    if args.pretrained:
        print(f"micro base: {copy_micro_base(args.out)}")
        return 0
    print(f"tiny checkpoint: {make_tiny(args.out, seed=args.seed)}")
    return 0


def _world_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", help="folder of the world; a finished one is kept, a broken-off one completed")
    parser.add_argument("--test", type=int, default=480, help="questions in futurebench.json (default: 480)")
    parser.add_argument("--train", type=int, default=3000, help="records in sft.json (default: 3000)")
    parser.add_argument("--perception", type=int, default=0, help="records in perception.json (default: 0)")
    parser.add_argument("--read-options", action="store_true", help="half of the perception records read the options")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same world (default: 0)")
    parser.add_argument("--twiffbench", type=int, metavar="N", help="also its first N questions as a TwiFF-Bench")


def _world(args: argparse.Namespace) -> int:
    from future_l1_plugin.data import make_world

    world = make_world(args.out, args.test, args.train, args.perception, args.seed, args.read_options)
    print(f"micro world: {world.root}")
    if args.twiffbench is not None:
        from future_l1_plugin.data.twiff_world import make_twiffbench

        print(f"micro TwiFF-Bench: {make_twiffbench(world.root, args.twiffbench)}")
    return 0


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    text = "part the records that can be trained on from the others; decodes every frame that is used"
    check = actions.add_parser("check", help=text, description=text)
    check.add_argument(
        "data", nargs="+", metavar="DATA", help="file, folder or dataset of the hub, org/name[:split][@revision]"
    )
    check.add_argument("--videos", required=True, metavar="ROOT", help="folder that the videos of rows are relative to")
    check.add_argument(
        "--out", required=True, metavar="FOLDER", help="gets clean.jsonl, rejected.jsonl, summary.json; may be resumed"
    )
    check.add_argument("--workers", type=int, metavar="N", help="processes that decode (default: one for each core)")
    check.add_argument("--strict", action="store_true", help="exit code 1 if any row is rejected")


def _data(args: argparse.Namespace) -> int:
    from future_l1_plugin.data.check import check_data
    from future_l1_plugin.report.check import print_check

    outcome = check_data(args.data, args.videos, args.out, args.workers)
    print_check(outcome)
    return 1 if args.strict and outcome.summary["rejected"] else 0


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="latent checkpoint: folder or hub id")
    parser.add_argument("--question", required=True)
    parser.add_argument("--video", help="a video file")
    parser.add_argument("--image", action="append", default=[], help="a picture; repeatable")
    parser.add_argument("--frames", type=int, default=32, help="frames taken from the video, evenly (default: 32)")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (default)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    parser.add_argument("--device", help="cpu, cuda, .. (default: cuda if there is one)")


def _generate(args: argparse.Namespace) -> int:
    from future_l1_plugin.integrations.chat import answer

    answer(
        args.model,
        args.question,
        images=args.image,
        video=args.video,
        num_frames=args.frames,
        device=args.device,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
    )
    return 0


def _curate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML file, such as recipes/curate_micro.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value, such as select.size=5000")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="do this share of the records (default: 1/1)")
    parser.add_argument("--select", action="store_true", help="make no answers: select from those of all shards")


def _curate(args: argparse.Namespace) -> int:
    from future_l1_plugin.config import load_recipe
    from future_l1_plugin.data.curation import curate
    from future_l1_plugin.data.curation_answers import shard_of
    from future_l1_plugin.data.curation_recipe import CurationRecipe
    from future_l1_plugin.report.curation import plot_curation, print_curation

    shard = shard_of(args.shard)
    recipe = load_recipe(args.recipe, CurationRecipe, args.overrides)
    vllm = None
    if recipe.rollouts.engine == "vllm":
        from future_l1_plugin.integrations.vllm.engine import VllmEngine as vllm
    curated = curate(recipe, shard, args.select, vllm)
    if curated is None:
        print(f"shard {args.shard} is done. When all are: bring their *.jsonl together in {recipe.output}, --select")
        return 0
    plot_curation(curated, recipe.rollouts.n, recipe.output)
    print_curation(curated, recipe.output)
    return 0


def _judge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", help="--output_path of lmms-eval, run on twiffbench with --log_samples")
    parser.add_argument(
        "--judge", action="append", default=[], metavar="YAML", help="keys of EndpointSettings; repeatable"
    )
    parser.add_argument("--model", help="instead: a judge with default settings, by the name of its model")
    parser.add_argument("--base-url", metavar="URL", help="where that is served (default: OpenAI)")


def _judge(args: argparse.Namespace) -> int:
    from future_l1_plugin.config import load_recipe
    from future_l1_plugin.endpoint.settings import EndpointSettings
    from future_l1_plugin.errors import ConfigError
    from future_l1_plugin.evaluation.judging import judge_run, print_judged

    if bool(args.judge) == bool(args.model) or (args.base_url and not args.model):
        raise ConfigError("expected either --judge YAML [--judge YAML ..], or --model M [--base-url URL]")
    judges = [load_recipe(file, EndpointSettings) for file in args.judge]
    if args.model:
        place = {"base_url": args.base_url} if args.base_url else {}
        judges.append(EndpointSettings(model=args.model, **place))
    return 0 if print_judged(judge_run(args.output, judges)) else 1


def _probe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="latent checkpoint: folder or hub id")
    parser.add_argument("--task", default="futurebench", choices=["futurebench"])
    parser.add_argument("--limit", type=int, metavar="N", help="ask the first N questions (default: all)")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--out", default="outputs/probe", help="folder of tables and responses (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of noise, shuffling, swapping and pools (default: 0)")
    parser.add_argument("--model-args", default="", help="further arguments of the model, as lmms-eval's --model_args")
    parser.add_argument("--gen-kwargs", help="as lmms-eval's --gen_kwargs, such as max_new_tokens=128")
    parser.add_argument("--records", help="TwiFF records whose future frames are looked for in the latents")
    parser.add_argument("--videos", metavar="ROOT", help="folder that the videos of --records are relative to")
    parser.add_argument("--pool", type=int, default=16, help="frames that a span's own is looked for in (default: 16)")
    parser.add_argument("--question-media", default="images", choices=["images", "video"], help="as in SFT")


def _probe(args: argparse.Namespace) -> int:
    from future_l1_plugin.data import load_records
    from future_l1_plugin.evaluation.probe import RecordsToShow
    from future_l1_plugin.integrations.lmms_eval.probe import probe
    from future_l1_plugin.report.probe import report_probe

    show = None
    if args.records:
        show = RecordsToShow(load_records(args.records, args.videos), args.pool, args.question_media)
    settings = (args.limit, args.batch_size, args.seed, args.model_args, args.gen_kwargs, show)
    report_probe(probe(args.model, args.out, *settings), args.out)
    return 0


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", help="--output_path of lmms-eval, run on futurebench with --log_samples")
    parser.add_argument("b", help="another one, of the same questions")
    parser.add_argument("--anyway", action="store_true", help="even if data, frames or prompts differ")


def _compare(args: argparse.Namespace) -> int:
    from future_l1_plugin.evaluation.compare import compare, show

    show(compare(args.a, args.b, args.anyway))
    return 0


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", help="output of scripts/demo.sh")
    parser.add_argument("--rl", nargs="+", metavar="FILE", help="instead: metrics files of runs of verl, to be plotted")
    parser.add_argument("--out", metavar="PNG", help="the picture to write, with --rl")
    parser.add_argument("--val-questions", type=int, metavar="N", help="questions of an RL validation, for error bars")


def _report(args: argparse.Namespace) -> int:
    from future_l1_plugin.errors import ConfigError

    if (args.folder is None) == (args.rl is None) or (args.rl is None) != (args.out is None):
        raise ConfigError("expected either FOLDER, or --rl FILE [FILE ..] --out PNG")
    from future_l1_plugin.report import plot_rl_files, report_demo

    if args.rl:
        plot_rl_files(args.rl, args.out, args.val_questions)
        print(f"curves: {args.out}")
    else:
        report_demo(args.folder, args.val_questions)
    return 0


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a recipe of verl, such as recipes/la_dapo.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value, as `python -m verl.trainer.main_ppo` takes them")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="of a GPU (default: of the one here, else 80)")


def _plan(args: argparse.Namespace) -> int:
    from future_l1_plugin.compat import require

    require("verl")
    from future_l1_plugin.integrations.verl.plan import run

    return run(args.recipe, args.overrides, args.gpu_memory)


COMMANDS = (
    Command("doctor", "check versions, device, video and disk; print what fixes them", None, _doctor),
    Command("convert", "make a latent checkpoint from a Qwen3-VL one", _convert_arguments, _convert),
    Command("export", "make a latent checkpoint from a checkpoint-N of an SFT run", _export_arguments, _export),
    Command("generate", "ask a latent checkpoint about a video or pictures", _generate_arguments, _generate),
    Command("world", "draw the micro world: videos, questions, training records", _world_arguments, _world),
    Command("curate", "choose the records whose future frames help a base model most", _curate_arguments, _curate),
    Command("judge", "score logged answers to TwiFF-Bench by one or several judges", _judge_arguments, _judge),
    Command("data", "check records and videos before training", _data_arguments, _data),
    Command(
        "plan",
        "dry run of an RL recipe: values, checks, memory, bytes; non-zero if it would not run",
        _plan_arguments,
        _plan,
    ),
    Command("tiny", "write a latent Qwen3-VL of two million parameters", _tiny_arguments, _tiny),
    Command("probe", "ask whether the latents matter: spoil them, and count answers", _probe_arguments, _probe),
    Command("compare", "the paired difference of two futurebench runs", _compare_arguments, _compare),
    Command("report", "table and pictures of a demo run, or curves of RL runs", _report_arguments, _report),
)


def build_parser() -> argparse.ArgumentParser:
    """The parser with every command of the table."""
    parser = argparse.ArgumentParser(prog="future-l1", description="Interleaved latent visual reasoning (Future-L1).")
    parser.add_argument("--version", action="version", version=f"future_l1_plugin {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        sub = commands.add_parser(command.name, help=command.help, description=command.help)
        if command.arguments is not None:
            command.arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except UserError as error:
        print(f"future-l1 {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"future-l1 {args.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
