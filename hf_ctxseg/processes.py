"""How several processes of one training fail: together, and with one message."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import TrainingArguments

_HEADSTART = 2.0  # seconds for the process that tells; torchrun kills the others when the first one ends


@contextmanager
def failing_together(arguments: TrainingArguments) -> Iterator[None]:
    """End every process if one of them meets bad input within; the processes must not wait for each other there.

    Raises:
        ValueError: As raised within; so is `OSError`. Of several processes the first that failed raises its own.
        SystemExit: In the others, with the exit code of bad input, 2.
    """
    failure: ValueError | OSError | None = None
    try:
        yield
    except (ValueError, OSError) as error:
        failure = error
    if arguments.world_size > 1:
        failed = torch.zeros(arguments.world_size, dtype=torch.int32, device=arguments.device)
        failed[arguments.process_index] = failure is not None
        torch.distributed.all_reduce(failed)
        if failed.any() and int(failed.argmax()) != arguments.process_index:
            time.sleep(_HEADSTART)
            raise SystemExit(2) from failure
    if failure is not None:
        raise failure


def is_lost_process(error: BaseException) -> bool:
    """Whether the error says that another process of the training has ended, which then told why."""
    words = ("closed by peer", "reset by peer", "closed by remote", "Broken pipe")
    return torch.distributed.is_initialized() and any(word in str(error) for word in words)
