"""What all scripts share: flags, errors, processes, signals, progress, seeds, locks and files."""
import argparse
import contextlib
import datetime
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

import filelock
import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

LOCK = ".lock"
# What a terminal, a cluster or a person sends to end a process, where the platform has it.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
           if hasattr(signal, name)]


class UserError(ValueError):
    """What a user can mend. run() prints its one line: the flag or file, and the remedy."""


def command_line(description):
    """An ArgumentParser that keeps line breaks and raises its errors as UserError, for run()."""
    parser = argparse.ArgumentParser(
        description=description, usage=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=28, width=100))

    def error(message):
        raise UserError(message.removeprefix("argument "))
    parser.error = error
    return parser


def number(interval="(-inf, inf)", kind=float):
    """An argparse type: a number in an interval that is written as in mathematics, "(0, 1]"."""
    low, high = (float(end) for end in interval[1:-1].split(","))

    def parse(text):
        value = kind(text)
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):
            raise argparse.ArgumentTypeError(f"{text} is not in {interval}")
        return value
    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def setup():
    """Joins the other processes under torchrun: (rank, world, device), on GPUs or the CPU."""
    cuda = torch.cuda.is_available()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if "RANK" in os.environ and not dist.is_initialized():
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        found = " ".join(f"{key}={os.environ.get(key, '')}"
                         for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
        message = f"waiting for the other processes ({found}); if there are none, unset RANK"
        waiting = threading.Timer(10, print, [message], {"file": sys.stderr, "flush": True})
        waiting.daemon = True
        waiting.start()
        # One rank may work alone for hours (evaluation, files); torchrun detects a dead one.
        # torchrun --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 with torch 2.13, which
        # hands restarted processes the address of the first attempt.
        try:
            with handlers_kept():
                listen(signal.SIG_DFL)  # while torch waits, Python could not act on a Ctrl-C
                dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                                        timeout=datetime.timedelta(days=7))
        except ValueError as e:  # torch names what is missing in the environment
            raise UserError(f"RANK is set, but: {e}; use torchrun, or unset RANK") from None
        except RuntimeError as e:
            device = os.environ.get("GLOO_SOCKET_IFNAME", "not set")
            known = ", ".join(name for _, name in socket.if_nameindex())
            raise UserError(f"the processes can't meet ({found} GLOO_SOCKET_IFNAME={device}; this "
                            f"machine has {known}): {str(e).splitlines()[0]}") from None
        finally:
            waiting.cancel()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return *ranks(), device


def ranks():
    """(rank, world), (0, 1) outside torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def reduce(x, op=dist.ReduceOp.SUM):
    """The sum of x over the processes, or another op, in place; x itself in a single process."""
    if ranks()[1] > 1:
        dist.all_reduce(x, op)
    return x


def barrier():
    """Waits for the other processes, if there are any; on the CPU, so that no GPU takes part."""
    reduce(torch.zeros(1))


def run(main):
    """Calls a script's main(). What a user can mend ends it with one line, and exit status 2.

    That is a UserError, or an OSError that names a file. All else is a bug, ours or of whoever
    edits these scripts, and keeps its traceback.

    Under torchrun rank 0 speaks first, and torchrun then ends the others. When one rank exits, the
    collectives of its peers fail too, so messages about lost peers wait longest.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):  # a daemon may have none
        stream.reconfigure(errors="backslashreplace")  # names of files may not be UTF-8
    launched = "RANK" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    status = 0
    line = None
    try:
        main()
        if sys.stdout:
            sys.stdout.flush()
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except KeyboardInterrupt:
        status = 130
        line = "interrupted; run the same command to resume"
    except BrokenPipeError:  # what reads our output, such as head, has ended
        status = 141
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python writes there when it ends
    except Exception as e:
        status = 1
        if isinstance(e, UserError) or isinstance(e, OSError) and e.filename is not None:
            status = 2
            line = str(e) if isinstance(e, UserError) else f"{e.filename}: {e.strerror or e}"
            time.sleep(3 if rank else 0)
        elif not launched:
            raise
        elif isinstance(e, dist.DistError) or "gloo" in str(e):
            time.sleep(6)
            traceback.print_exc()
            line = f"rank {rank} lost the others: {e}"
        else:
            traceback.print_exc()
    if line:
        line = " ".join(line.split())
        print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
        if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun's own report, which comes last
            report = {"message": line, "timestamp": str(int(time.time()))}
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(report))
    if not launched:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # at an orderly exit gloo's threads abort one process in ten


def listen(handler):
    """Makes handler(number, frame) that of the signals that ask a process to end, as Ctrl-C does.

    Ignored signals stay ignored, so that nohup works; outside the main thread nothing is set.
    """
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                signal.signal(number, handler)


@contextlib.contextmanager
def handlers_kept():
    """Restores the signal handlers at the end of the block."""
    earlier = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            if signal.getsignal(number) != handler:
                signal.signal(number, handler)


def progress(total, name):
    """tqdm's bar of rank 0, for images; where there is no terminal, a line every half minute."""
    options = {}
    if not sys.stderr.isatty():
        options = {"file": Lines(), "mininterval": 30, "delay": 30,
                   "bar_format": "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left"}
    return tqdm(total=total, desc=name, unit="img", leave=False, disable=ranks()[0] > 0, **options)


class Lines:
    """A file for tqdm that prints each update as a line of its own, without carriage returns."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self):
        pass


def move(x, device):
    """x on the device; from the CPU through pinned memory, so that nothing waits for a GPU."""
    x = x.pin_memory() if device.type == "cuda" and not x.is_cuda else x
    return x.to(device, non_blocking=True)


def generator(*numbers, device="cpu"):
    """A random generator that is a function of whole numbers, such as (seed, step)."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    return torch.Generator(device).manual_seed(seed)


@contextlib.contextmanager
def locked(folder):
    """Makes a folder and holds a lock on it, FOLDER/.lock; of the ranks of a run, 0 does.

    UserError: another run holds it.
    """
    if ranks()[0] > 0:
        yield
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder}: is, or is in, a file; give a folder") from None
    lock = filelock.FileLock(Path(folder, LOCK))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"{folder}: another process is writing to it; wait for it, or give "
                        f"another folder") from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def atomic(path):
    """Opens a binary file that replaces path once it is complete and on the disk.

    OSError, which names path: that failed, and what was at path is still there.
    """
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save wraps OSError in RuntimeError
        cause = e if isinstance(e, OSError) else e.__context__
        if not isinstance(cause, OSError):
            raise
        reason = f"can't be written: {cause.strerror or cause}"
        raise OSError(cause.errno, reason, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)
