"""Train a byte-level H-Net of two levels, by default on enwik8.

    python train.py                              enwik8, ten minutes
    python train.py --data book.txt --steps 500
    python train.py --resume                     go on with the newest run

A run writes its folder, runs/<time> unless --out names one: config.json, metrics.jsonl,
checkpoint.pt, samples.txt and curves.png. Ctrl-C leaves a checkpoint; on a CPU, a resumed run whose
length is given by --steps has bitwise the losses of one that was never stopped. By --minutes the
learning rate follows the clock, which no two runs share.
"""

import argparse
import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from h_net_dynamic_chunking._version import __version__
from h_net_dynamic_chunking.files import write_text
from h_net_dynamic_chunking.training.batches import training_batch
from h_net_dynamic_chunking.training.checkpoint import Checkpoint
from h_net_dynamic_chunking.training.config import ATTENTIONS, MAMBAS, Config
from h_net_dynamic_chunking.training.corpus import Corpus, open_corpus
from h_net_dynamic_chunking.training.devices import resolve_device
from h_net_dynamic_chunking.training.evaluation import Evaluation, evaluate, gzip_bpb
from h_net_dynamic_chunking.training.folder import RunFolder, new_run, run_to_resume
from h_net_dynamic_chunking.training.interruption import Interruption
from h_net_dynamic_chunking.training.metrics import MetricsLog, Row, plot, read_rows
from h_net_dynamic_chunking.training.model import ByteHNet
from h_net_dynamic_chunking.training.optimizer import (
    build_optimizer,
    clip_gradients,
    set_learning_rate,
)
from h_net_dynamic_chunking.training.samples import samples_text
from h_net_dynamic_chunking.training.schedule import Limit, Stopwatch, warmup_stable_decay

ROOT = Path(__file__).resolve().parent
RUNS = Path("runs")
MINUTES = 10.0  # when neither --steps nor --minutes is given
OF_THE_CALL = {"out", "resume"}  # flags that config.json does not keep

# The last validation reads at most so much of the validation slice, from its start; those on the
# way read a sample of that, so that they take a second or two.
FINAL_VALIDATION_BYTES = 1_000_000
QUICK_VALIDATION_BYTES = 16_384


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train a byte-level H-Net of two levels, by default on enwik8.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", metavar="PATH", help="any file, or .gz, .xz, .zip of one; stdlib for Python's")
    add("--out", metavar="DIR", help="folder of the run (None = runs/<time in UTC>)")
    add("--resume", action="store_true", help="go on with the run in --out, or with the newest")
    add("--steps", type=int, help="length of the run in optimizer steps (None = no limit)")
    add("--minutes", type=float, help="length of the run in minutes (None = 10 without --steps)")
    add("--device", default="auto", help="auto, cpu, cuda, mps, ...")
    add("--seed", type=int, default=Config.seed, help="seed of weights and batches")
    # Sizes, from the outside in.
    add("--batch-size", type=int, default=Config.batch_size, help="windows in a step")
    add("--seq-len", type=int, default=Config.seq_len, help="bytes in a window")
    add("--dims", type=int, nargs=3, default=Config.dims, help="channels: stage 0, 1, main")
    add("--layouts", nargs=3, default=Config.layouts, help="layers: stage 0, 1, main network")
    add("--mamba", choices=MAMBAS, default=Config.mamba, help="library of the Mamba-2 layers")
    add("--attention", choices=ATTENTIONS, default=Config.attention, help="library of attention")
    # Rates.
    add(
        "--learning-rate",
        type=float,
        default=Config.learning_rate,
        help="peak, times a factor per stage",
    )
    add(
        "--target-ratio",
        type=float,
        nargs=2,
        default=Config.target_ratio,
        help="positions in a chunk: stage 0, 1",
    )
    add(
        "--ratio-loss-weight",
        type=float,
        default=Config.ratio_loss_weight,
        help="factor on the loss that pulls to --target-ratio (0 = off)",
    )
    # Habits.
    add("--val-every", type=int, default=500, help="steps between validations (0 = ends only)")
    add(
        "--checkpoint-every", type=int, default=100, help="steps between checkpoints (0 = end only)"
    )
    return parser


@dataclass
class Run:
    """A run that nothing speaks against: everything it needs is opened and checked."""

    args: argparse.Namespace
    config: Config
    limit: Limit
    folder: RunFolder
    corpus: Corpus
    model: ByteHNet
    optimizer: torch.optim.Optimizer
    device: torch.device
    stopwatch: Stopwatch
    step: int = 0
    bytes_seen: int = 0

    @property
    def progress(self) -> float:
        return self.limit.progress(self.step, self.stopwatch.seconds)

    def restore(self) -> None:
        saved = Checkpoint.load(self.folder.checkpoint, self.config.to_json(), self.device)
        try:
            self.model.load_state_dict(saved.model)
            self.optimizer.load_state_dict(saved.optimizer)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"resume: {self.folder.checkpoint} is of version {saved.version} of this package, "
                f"whose model differs from that of version {__version__}"
            ) from error
        self.step, self.bytes_seen = saved.step, saved.bytes_seen
        self.stopwatch = Stopwatch(saved.seconds)

    def save(self) -> None:
        Checkpoint(
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            step=self.step,
            bytes_seen=self.bytes_seen,
            seconds=self.stopwatch.seconds,
            config=self.config.to_json(),
            version=__version__,
        ).save(self.folder.checkpoint)


def prepare(argv: Sequence[str] | None) -> Run:
    """Open everything; ValueError refuses what cannot work before anything is written."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.resume:
        folder = run_to_resume(args.out, RUNS)
        # A flag that is not given again stays as it was; a new limit replaces the old ones.
        saved = folder.read_settings()
        if args.steps is not None or args.minutes is not None:
            saved = {name: saved[name] for name in saved.keys() - {"steps", "minutes"}}
        parser.set_defaults(**{name: saved[name] for name in vars(args).keys() & saved.keys()})
        args = parser.parse_args(argv)
    else:
        folder = new_run(args.out, RUNS)
    if args.steps is None and args.minutes is None:
        args.minutes = MINUTES

    for name in ("val_every", "checkpoint_every"):
        if getattr(args, name) < 0:
            raise ValueError(f"{name} is {getattr(args, name)}; it must be at least 0")
    limit = Limit(args.steps, args.minutes)
    device = resolve_device(args.device)
    config = Config.from_settings(vars(args))
    torch.manual_seed(config.seed)
    model = ByteHNet(config).to(device)
    optimizer = build_optimizer(model, config)

    corpus, notice = open_corpus(args.data, ROOT / "data")
    if notice is not None:
        print(notice)
    corpus.require(config.seq_len)
    args.data = corpus.source
    config = replace(config, corpus_sha256=corpus.sha256)

    run = Run(args, config, limit, folder, corpus, model, optimizer, device, Stopwatch())
    habits = {name: value for name, value in vars(args).items() if name not in OF_THE_CALL}
    settings = {**habits, **config.to_json(), "version": __version__}
    if args.resume:
        run.restore()
        if folder.metrics.exists():
            read_rows(folder.metrics)  # refuses a damaged file while nothing is written yet
        folder.write_settings(settings)
        return run
    folder.write_settings(settings)
    try:
        # So that even a run killed before its first checkpoint can be resumed.
        run.save()
    except (OSError, RuntimeError) as error:
        folder.config.unlink()
        raise ValueError(f"out: {folder.path} cannot hold a checkpoint ({error})") from error
    return run


def take_step(run: Run, content: Tensor) -> Row:
    """Update the weights with one batch from `content`, uint8 (length,)."""
    config, start = run.config, time.perf_counter()
    # Half a step on, so that neither the first nor the last step has the rate 0.
    progress = run.limit.progress(run.step + 0.5, run.stopwatch.seconds)
    learning_rate = config.learning_rate * warmup_stable_decay(progress)
    set_learning_rate(run.optimizer, learning_rate)

    windows = training_batch(content, config.batch_size, config.seq_len, config.seed, run.step)
    windows = windows.to(run.device)
    prediction = run.model(windows[:, :-1])
    bits_per_byte = prediction.bits_per_byte(windows[:, 1:])
    loss = bits_per_byte * math.log(2) + prediction.weighted_ratio_loss
    run.optimizer.zero_grad()
    loss.backward()
    clip_gradients(run.model)
    run.optimizer.step()

    run.step += 1
    run.bytes_seen += (read := config.batch_size * config.seq_len)
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"the loss is {loss.item()} at step {run.step}")
    return Row(
        step=run.step,
        bytes_seen=run.bytes_seen,
        train_bpb=bits_per_byte.item(),
        val_bpb=None,
        bytes_per_chunk=[read / int(count) for count in prediction.chunk_counts],
        ratio_loss=prediction.ratio_loss.item(),
        bytes_per_second=read / (time.perf_counter() - start),
        lr=learning_rate,
    )


def validate(run: Run, content: Tensor, finished: bool) -> Evaluation:
    """Measure the model on `content`, uint8 (length,), and write samples from it."""
    config = run.config
    every = 1 if finished else max(1, len(content) // QUICK_VALIDATION_BYTES)
    evaluation = evaluate(run.model, content, config.batch_size, config.seq_len, every)
    if not math.isfinite(evaluation.bpb):
        raise FloatingPointError(f"validation is {evaluation.bpb} at step {run.step}")
    # Not at the first step, whose samples would be noise and delay the start.
    if run.step > 1 or finished:
        write_text(run.folder.samples, samples_text(run.model, content, config.seed))
    return evaluation


def train(run: Run) -> int:
    """Take steps until the limit or a signal; return the exit status."""
    args, (training, validation, _) = run.args, run.corpus.split()
    held_out = validation[:FINAL_VALIDATION_BYTES]
    if run.progress >= 1:
        print(f"{run.folder.path} is complete; a higher --steps or --minutes goes on with it")
        return 0

    def due(every: int) -> bool:
        return every > 0 and run.step % every == 0

    log = MetricsLog(run.folder.metrics, run.step)
    with Interruption() as interruption, log, progress_bar(run.progress) as bar:
        finished = False
        while not finished:
            row = take_step(run, training)
            finished = run.progress >= 1
            if finished or run.step == 1 or due(args.val_every):
                evaluation = validate(run, held_out, finished)
                row = replace(row, val_bpb=evaluation.bpb)
                bar.write(f"step {run.step}: validation {evaluation.bpb:.3f} bits per byte")
            log.append(row)
            show(bar, run.progress, row)
            stopped = interruption.exit_status
            if finished or stopped is not None or due(args.checkpoint_every):
                run.save()
            if stopped is not None and not finished:
                break

    if stopped is not None and not finished:
        out = shlex.quote(str(run.folder.path))
        print(f"stopped after step {run.step}; go on with: python train.py --resume --out {out}")
        return stopped
    draw(run)
    report(run, evaluation, held_out)
    return 0


def progress_bar(progress: float) -> tqdm:
    """Return a bar over the share of the run that is over; slow where it is not on a terminal."""
    layout = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(total=1.0, initial=progress, bar_format=layout, mininterval=interval)


def show(bar: tqdm, progress: float, row: Row) -> None:
    lengths = " / ".join(f"{length:.2f}" for length in row.bytes_per_chunk)
    text = f"step {row.step}, {row.train_bpb:.3f} bpb, {lengths} bytes per chunk"
    bar.set_postfix_str(text, refresh=False)
    bar.update(min(progress, 1.0) - bar.n)


def draw(run: Run) -> None:
    try:
        plot(read_rows(run.folder.metrics), run.config.bytes_per_chunk, run.folder.curves)
    except ImportError as error:
        print(f"no {run.folder.curves.name} ({error}): pip install matplotlib")


def report(run: Run, evaluation: Evaluation, content: Tensor) -> None:
    """Print the figures of the finished run beside what they are to be compared with."""
    print(
        f"validation: {evaluation.bpb:.3f} bits per byte on {len(content):,} held-out bytes, "
        f"for which gzip -9 needs {gzip_bpb(content):.3f}"
    )
    pairs = zip(evaluation.bytes_per_chunk, run.config.bytes_per_chunk, strict=True)
    for stage, (length, target) in enumerate(pairs):
        off = 100 * (length / target - 1)
        print(f"stage {stage}: {length:.2f} bytes per chunk, target {target:g} ({off:+.0f}%)")


def announce(run: Run) -> None:
    """Say what runs where, and what was chosen."""
    config = run.config
    millions = sum(parameter.numel() for parameter in run.model.parameters()) / 1e6
    print(run.corpus.describe())
    print(
        f"model: {' '.join(config.layouts)} of width {' '.join(map(str, config.dims))}, "
        f"{millions:.1f} million parameters, mamba by {config.mamba}, "
        f"attention by {config.attention}, on {run.device}"
    )
    print(f"run: {run.folder.path} from step {run.step}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        run = prepare(argv)
    except ValueError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    announce(run)
    try:
        return train(run)
    except FloatingPointError as error:
        print(f"train.py: {error}; try a lower --learning-rate", file=sys.stderr)
        return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before the first step, when there is nothing to keep yet
        sys.exit(130)
