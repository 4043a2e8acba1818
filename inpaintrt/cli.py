"""The command line: `inpaintrt fill | enhance | flow | demo | info | explain | verify | bench | tune`, thin over Python.

Exit status: 0 done; 1 done with failures (a file of a folder, a verification); 2 nothing done, one line says why.
Progress and messages go to stderr, reports to stdout.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

import inpaintrt as irt

from . import options, pipeline
from .report import Report
from .runtime.errors import InpaintRTError, KernelError, UnsupportedError
from .runtime.settings import BACKENDS

if TYPE_CHECKING:
    from . import jobs

DEFAULT_MODEL = "lama_mini"
_WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")


class UsageError(InpaintRTError):
    """An argument that cannot be used; the message is for the person who typed it."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"inpaintrt: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. `argv` without the program's name, default `sys.argv[1:]`."""
    args = _parser().parse_args(argv)
    threads = torch.get_num_threads()
    try:
        if getattr(args, "threads", None):
            torch.set_num_threads(args.threads)
        return int(args.run(args))
    except KernelError:
        raise  # a defect of the library: the traceback belongs in the report
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: nothing is left to say, also not by the interpreter at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (InpaintRTError, OSError) as error:
        say(f"error: {' '.join(str(error).splitlines())}")
        return 2
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    finally:
        torch.set_num_threads(threads)


def say(message: str) -> None:
    print(f"inpaintrt: {message}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="inpaintrt", description="Fill holes in photos with inpainting networks made fast.")
    parser.add_argument("--version", action="version", version=f"inpaintrt {irt.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    def command(
        name: str, run: Callable[[argparse.Namespace], int], summary: str, more: str = ""
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {more}".strip())
        sub.set_defaults(run=run)
        return sub

    fill = command(
        "fill",
        _fill,
        "fill the hole of a photo, or of every photo in a folder",
        "The mask is white (128 or more) where the photo is to be filled, and has the size of the photo as displayed. "
        "Pixels outside the hole stay bit-identical in .png, .webp, .tif, .bmp and .ppm. "
        "In folders, a.jpg belongs to a.png, a-mask.png or a_mask.png.",
    )
    fill.add_argument("photo", type=Path, metavar="PHOTO", help="photo, or folder of photos")
    fill.add_argument("mask", type=Path, metavar="MASK", help="mask, or folder of masks (may be the photos' own)")
    fill.add_argument("-o", "--out", type=Path, required=True, help="file to write, or folder")
    fill.add_argument("--invert-mask", action="store_true", help="black is the hole, white is kept")
    fill.add_argument("--overwrite", action="store_true", help="replace files that exist")
    fill.add_argument("--format", default="png", metavar="SUFFIX", help="of the results in a folder (default: png)")
    fill.add_argument(
        "--max-pixels",
        type=_positive,
        default=pipeline.MAX_PIXELS,
        metavar="N",
        help="larger photos are filled in crops around their holes, which bounds memory; networks of a single size always "
        "fill in such (default: %(default)s)",
    )
    fill.add_argument(
        "--margin",
        type=_not_negative,
        default=pipeline.MARGIN,
        metavar="N",
        help="pixels of context around a hole in such crops (default: %(default)s)",
    )
    fill.add_argument("--no-accelerate", action="store_true", help="run the reference network")
    fill.add_argument(
        "--seed", type=int, metavar="N", help="of networks that draw random numbers: each gives another fill"
    )
    fill.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the network or of its inpaint, such as tokens_per_step=1 or pixels=imagenet; may be repeated",
    )
    _model_options(fill)

    enhance = command(
        "enhance",
        _enhance,
        "upscale, denoise or derain a photo with IPT, or every photo in a folder",
        "The photo is computed in overlapping patches of 48x48 pixels, each once; photos smaller than a patch are refused. "
        "EXIF and alpha are left out.",
    )
    enhance.add_argument("photo", type=Path, metavar="PHOTO", help="photo, or folder of photos")
    enhance.add_argument("-o", "--out", type=Path, required=True, help="file to write, or folder")
    enhance.add_argument("--weights", type=Path, required=True, metavar="FILE", help="IPT's weights, of any tasks")
    enhance.add_argument(
        "--task",
        type=_task,
        metavar="TASK",
        help="x2, x3, x4, denoise, derain, …, or its place in the weights, from 0; may be left out where weights are for one",
    )
    enhance.add_argument(
        "--blend",
        choices=("original", "smooth"),
        default="original",
        help="how patches are joined: by the published rule, or without seams (default: %(default)s)",
    )
    enhance.add_argument("--overwrite", action="store_true", help="replace files that exist")
    enhance.add_argument("--format", default="png", metavar="SUFFIX", help="of the results in a folder (default: png)")
    enhance.add_argument("--no-accelerate", action="store_true", help="run the reference network")
    _run_options(enhance)

    flow = command(
        "flow",
        _flow,
        "paint from where in a photo contextual attention takes each part of a hole",
        "Hue is the direction from a cell to its source, saturation the distance, white the cell itself: pink is bottom "
        "left, green is top right. The photo is filled in one piece, whatever its size.",
    )
    flow.add_argument("photo", type=Path, metavar="PHOTO", help="photo")
    flow.add_argument("mask", type=Path, metavar="MASK", help="mask of the photo's size, white = hole")
    flow.add_argument("-o", "--out", type=Path, required=True, help="picture to write")
    flow.add_argument("--invert-mask", action="store_true", help="black is the hole, white is kept")
    flow.add_argument("--whole", action="store_true", help="paint the known part of the photo, too")
    flow.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    _model_options(flow)
    flow.set_defaults(model="deepfill_v2")

    demo = command("demo", _demo, "fill the photo that ships with the package, with times and errors before and after")
    demo.add_argument(
        "-o", "--out", type=Path, default=Path(), metavar="DIR", help="folder of the picture (default: this one)"
    )
    _run_options(demo)

    info = command(
        "info", _info, "show versions, devices, instruction sets and backends, with reasons where one is absent"
    )
    info.add_argument("--json", action="store_true", help="as JSON")

    for name, run, summary in (
        ("explain", _explain, "show what each module of a model runs on, and why not on something else"),
        ("verify", _verify, "compare an accelerated model with the untouched one, module by module"),
    ):
        sub = command(name, run, summary)
        _model_options(sub)
        _size_option(sub)
        style = sub.add_mutually_exclusive_group()
        style.add_argument("--json", action="store_true", help="as JSON")
        style.add_argument("--markdown", action="store_true", help="as Markdown")

    bench = command("bench", _bench, "time a model or an op against its reference, interleaved in one process")
    bench.add_argument("what", nargs="?", default=DEFAULT_MODEL, metavar="MODEL_OR_OP", help="default: %(default)s")
    bench.add_argument("--rounds", type=_positive, default=10, metavar="N", help="default: %(default)s")
    bench.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers and the machine's identity")
    _size_option(bench)
    _run_options(bench)

    tune = command(
        "tune",
        _tune,
        "find out which algorithms are fastest on this CPU for a model's convolutions, and remember it",
        "What is found holds for this size and number of threads, and is taken whenever the library runs; the report names "
        "the file, which may be deleted. Launch configurations of GPU kernels are not tuned yet.",
    )
    tune.add_argument(
        "model",
        nargs="?",
        default=DEFAULT_MODEL,
        metavar="MODEL",
        help="a model that ships with the package, or LaMa weights; default: %(default)s",
    )
    _weights_option(tune)
    _size_option(tune)
    tune.add_argument("--rounds", type=_positive, default=5, metavar="N", help="of timing; default: %(default)s")
    tune.add_argument("--dry-run", action="store_true", help="measure and report, remember nothing")
    _threads_option(tune)
    return parser


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME|FILE",
        help="a model that ships with the package, or LaMa weights: safetensors, torch checkpoint or TorchScript archive; "
        "default: %(default)s",
    )
    _weights_option(parser)
    _run_options(parser)


def _weights_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="weights for the network that the model's name stands for, such as lama or deepfill_v2",
    )


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="default: %(default)s")
    _threads_option(parser)


def _threads_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=_positive, metavar="N", help="default: torch's (OMP_NUM_THREADS)")


def _size_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size",
        type=_size,
        metavar="HxW",
        help="height x width (default: 400x600, or the network's only one)",
    )


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _not_negative(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def _task(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 400x600") from None
    return height, width


def _load(name: str, weights: Path | None = None, **making: Any) -> nn.Module:
    """A shipped model by name, a network by name with `weights`, or LaMa weights by path."""
    if weights is None and _is_file(name):
        name, weights = "lama", Path(name)
    try:
        model: nn.Module = irt.load(name, weights, **making)
    except (ValueError, TypeError) as error:
        if isinstance(error, TypeError) and not making:
            raise
        raise UsageError(str(error)) from error
    return model


def _is_file(name: str) -> bool:
    path = Path(name)
    return path.suffix.lower() in _WEIGHTS or os.sep in name or path.is_file()


def _options(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `--option` and `--seed` give to the network, and to its `inpaint`."""
    from .models.loading import NETWORKS, SHIPPED

    if not args.option and args.seed is None:
        return {}, {}
    name = "lama" if args.weights is None and _is_file(args.model) else SHIPPED.get(args.model, (args.model,))[0]
    if name not in NETWORKS:
        return {}, {}  # loading says so
    try:
        given = options.typed(args.option)
        if args.seed is not None:
            if "seed" not in options.accepted(getattr(NETWORKS[name], "inpaint", None)):
                drawing = [
                    n for n, net in NETWORKS.items() if "seed" in options.accepted(getattr(net, "inpaint", None))
                ]
                raise UsageError(f"--seed {args.seed}: {args.model} draws no random numbers; {', '.join(drawing)} do")
            if "seed" in given:
                raise UsageError("--seed and --option seed=… are both given; accepted: one of them")
            given["seed"] = args.seed
        return options.divided(given, NETWORKS[name])
    except ValueError as error:
        raise UsageError(str(error)) from error


def _fill(args: argparse.Namespace) -> int:
    from . import jobs

    work = jobs.plan(args.photo, args.mask, args.out, suffix=_suffix(args), overwrite=args.overwrite)
    making, filling = _options(args)
    model = _load(args.model, args.weights, **making)
    if not hasattr(model, "inpaint"):
        raise UsageError(f"{args.model} fills no holes; what it does with a photo: inpaintrt enhance")
    if not args.no_accelerate:
        irt.accelerate(model, backend=args.backend, composited=True)  # known pixels of the result are the photo's

    def one(job: jobs.Job) -> jobs.Done:
        try:
            done = jobs.fill_file(
                model,
                job,
                invert_mask=args.invert_mask,
                max_pixels=args.max_pixels,
                margin=args.margin,
                overwrite=args.overwrite,
                options=filling,
            )
        except ValueError as error:
            if not filling:
                raise
            raise UsageError(str(error)) from error
        skipped = [note for note in irt.explain(model).notes if "composited: the last call" in note]
        return dataclasses.replace(done, notes=[*done.notes, *skipped])

    return _each({job.photo: partial(one, job) for job in work}, args, "filled")


def _enhance(args: argparse.Namespace) -> int:
    from . import jobs

    work = jobs.plan_photos(args.photo, args.out, suffix=_suffix(args), overwrite=args.overwrite)
    model: Any = _load("ipt", args.weights)
    try:
        model.index(args.task)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if not args.no_accelerate:
        irt.accelerate(model, backend=args.backend)

    def one(path: Path, target: Path) -> jobs.Done:
        try:
            return jobs.enhance_file(model, path, target, args.task, blend=args.blend, overwrite=args.overwrite)
        except ValueError as error:
            raise UsageError(str(error)) from error

    return _each({path: partial(one, path, target) for path, target in work}, args, "enhanced")


def _suffix(args: argparse.Namespace) -> str:
    return "." + str(args.format).lower().lstrip(".")


def _each(work: dict[Path, Callable[[], jobs.Done]], args: argparse.Namespace, done: str) -> int:
    """Do the work for each photo and tell; in a folder, a photo that fails does not stop the others."""
    from PIL import Image

    one = not args.photo.is_dir()
    if not one:
        args.out.mkdir(parents=True, exist_ok=True)
    start, failed = time.perf_counter(), 0
    for number, (photo, run) in enumerate(work.items(), 1):
        begin = time.perf_counter()
        try:
            # Sizes are limited by an error in read_photo; Pillow's earlier warning would only alarm.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                result = run()
        except (KernelError, UnsupportedError):
            raise  # the next photo would meet the same
        except InpaintRTError as error:
            if one:
                raise
            failed += 1
            say(f"[{number}/{len(work)}] {photo.name}  FAILED: {error}")
            continue
        for note in result.notes:
            say(f"note: {note}")
        for warning in result.warnings:
            say(f"warning: {warning}")
        say(f"[{number}/{len(work)}] {photo.name}  {time.perf_counter() - begin:.2f} s  {result.summary}")
    if not one:
        seconds = time.perf_counter() - start
        say(f"{len(work) - failed} {done}, {failed} failed, {seconds:.1f} s; results in {args.out}")
    return 1 if failed else 0


def _flow(args: argparse.Namespace) -> int:
    from PIL import Image

    from . import images, viz

    begin = time.perf_counter()
    target = images.writes(args.out)
    images.check_target(args.out, overwrite=args.overwrite)
    with warnings.catch_warnings():  # as in `_each`
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        photo, mask = images.read_photo(args.photo), images.read_mask(args.mask, invert=args.invert_mask)
    images.check_sizes(photo, mask)
    images.check_writable(args.out, dataclasses.replace(photo, pixels=photo.rgb))
    if not mask.hole.any():
        raise UsageError(f"{args.mask} marks no hole")
    model = irt.accelerate(_load(args.model, args.weights), backend=args.backend)
    picture = viz.flow_of_fill(model, photo.rgb, mask.hole, whole=args.whole)
    with images.replacing(args.out, overwrite=args.overwrite) as file:
        Image.fromarray(picture).save(file, format=target.name, **target.options)
    say(f"{args.out}  {time.perf_counter() - begin:.2f} s  {mask.describe()}")
    return 0


def _demo(args: argparse.Namespace) -> int:
    from . import demo

    return 0 if demo.run(args.out, backend=args.backend) else 1


def _info(args: argparse.Namespace) -> int:
    report = irt.info()
    print(report.to_json() if args.json else report)
    return 0


def _explain(args: argparse.Namespace) -> int:
    return _reported(args, irt.explain)


def _verify(args: argparse.Namespace) -> int:
    return _reported(args, irt.verify)


def _reported(args: argparse.Namespace, ask: Callable[..., Report]) -> int:
    model = _load(args.model, args.weights)
    example = _example(model, args.size)
    irt.accelerate(model, backend=args.backend)
    report = ask(model, *example)
    print(report.to_json() if args.json else report.to_markdown() if args.markdown else report)
    return 0 if report.ok else 1


def _example(model: nn.Module, size: tuple[int, int] | None) -> tuple[Any, ...]:
    """The demo photo at `size`, as the arguments of the model's forward."""
    from .demo import example

    net: Any = model
    if hasattr(net, "tiled"):  # IPT, whose forward takes patches of one size, whatever the image's
        return example(net.patch, net.patch)[:, :3] * 255, 0
    only: tuple[int, int] | None = getattr(net, "only_size", None)
    height, width = size or only or (400, 600)
    accepted = ""
    if only is not None and (height, width) != only:
        accepted = f"the network knows only {only[0]}x{only[1]}"
    elif min(height, width) < net.min_size or height % net.size_multiple or width % net.size_multiple:
        accepted = f"both sides must be multiples of {net.size_multiple} and at least {net.min_size}"
    if accepted:
        raise UsageError(f"--size {height}x{width}: {accepted}")
    x = example(height, width)
    found = net.network_input(x[:, :3], x[:, 3:])
    return found if isinstance(found, tuple) else (found,)


def _bench(args: argparse.Namespace) -> int:
    from . import bench

    if args.what in bench.op_names():
        report = bench.op(args.what, backend=args.backend, rounds=args.rounds)
    else:
        model = _load(args.what)
        (example,) = _example(model, args.size)  # a name or a file without weights of its own is a LaMa
        report = bench.model(model, example, name=args.what, backend=args.backend, rounds=args.rounds)
    print(report)
    if args.json:
        bench.write_json(args.json, report)
    return 0


def _tune(args: argparse.Namespace) -> int:
    from . import tuner

    model = _load(args.model, args.weights)
    example = _example(model, args.size)
    irt.accelerate(model, backend="cpu")
    report = tuner.tune(model, *example, rounds=args.rounds, save=not args.dry_run, progress=say)
    print(report)
    return 0 if report.ok else 1
